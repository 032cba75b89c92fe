"""Check the notebooks: what each one keeps to. Reads their JSON alone, executes nothing.

python tools/conventions.py    print all complaints; the status is 1 if there is one

A rule is a function that takes a Notebook and yields one complaint for each fault.
"""

import ast
import base64
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import stamp

ROOT = Path(__file__).resolve().parents[1]
RULES = []

NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# A tag folds: a solution in Jupyter ("jupyter") and in Colab ("cellView"); the output that
# answers a "Predict" in Jupyter alone, where running the cell opens it. Hosting sites show both.
FOLDED = {
    "solution": {
        "jupyter": {"source_hidden": True, "outputs_hidden": True},
        "cellView": "form",
    },
    "answer": {"jupyter": {"outputs_hidden": True}},
}


def folding(tags: list[str]) -> dict:
    """The metadata of a cell with these tags, beside the tags themselves."""
    return next((metadata for tag, metadata in FOLDED.items() if tag in tags), {})


def rule(function):
    RULES.append(function)
    return function


class Notebook:
    def __init__(self, path: Path):
        self.path = path
        self.json = json.loads(path.read_text(encoding="utf-8"))
        self.cells = self.json["cells"]
        self.code = [cell for cell in self.cells if cell["cell_type"] == "code"]
        self.markdown = [cell for cell in self.cells if cell["cell_type"] == "markdown"]
        self.outputs = [(cell, out) for cell in self.code for out in cell["outputs"]]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def text_of(output: dict) -> str:
    """Everything in an output that can be read; no pictures."""
    parts = [output.get("text", ""), *output.get("traceback", [])]
    parts += [data for mime, data in output.get("data", {}).items() if mime.startswith("text/")]
    return "\n".join("".join(part) for part in parts)


def prose(text: str) -> str:
    """Markdown without its code blocks and code spans."""
    return re.sub(r"```.*?```|`[^`]*`", " ", text, flags=re.DOTALL)


def dead_links(text: str, folder: Path) -> Iterator[str]:
    """The targets in this Markdown that are files, seen from a folder, and do not exist."""
    for target in re.findall(r"""\]\(\s*([^)\s]+)|(?:href|src)=["']([^"']+)""", prose(text)):
        target = "".join(target)
        if not re.match(r"\w+:|#", target) and not (folder / target.partition("#")[0]).exists():
            yield target


def is_ignored(cell: dict) -> bool:
    return "nbval-ignore-output" in tags(cell)


# How a notebook opens and closes


@rule
def opening(notebook: Notebook) -> Iterator[str]:
    first = notebook.cells[0]
    if first["cell_type"] != "markdown" or not source(first).startswith("# "):
        yield "the first cell is not Markdown that starts with a title"
    badge = stamp.badge(notebook.path.stem)
    for needed in ("**You will**", "**You need**", "**Run time**", badge):
        if needed not in source(first):
            yield f"the first cell lacks {needed!r}"


@rule
def neighbours(notebook: Notebook) -> Iterator[str]:
    """The first cell links to the previous and to the next notebook."""
    names = sorted(path.name for path in notebook.path.parent.glob("*.ipynb"))
    here = names.index(notebook.path.name)
    for name in names[max(here - 1, 0) : here] + names[here + 1 : here + 2]:
        if f"]({name})" not in source(notebook.cells[0]):
            yield f"the first cell does not link to {name}"


@rule
def closing(notebook: Notebook) -> Iterator[str]:
    if not any("You have seen" in source(cell) for cell in notebook.markdown):
        yield "no Markdown cell says 'You have seen'"


@rule
def setup(notebook: Notebook) -> Iterator[str]:
    """The first code cell is the set-up cell, to the letter."""
    first = notebook.code[0]
    if first["id"] != "setup":
        yield f"the first code cell is {first['id']}, not setup"
    if source(first) != stamp.setup_cell():
        yield "the set-up cell differs from the one in tools/stamp.py: run `make stamp`"


@rule
def address(notebook: Notebook) -> Iterator[str]:
    """The repository's address stands only where `make stamp` finds it."""
    for cell in notebook.cells[1:]:
        if cell["id"] != "setup" and stamp.slug() in source(cell):
            yield f"cell {cell['id']}: the repository's address"


@rule
def solutions(notebook: Notebook) -> Iterator[str]:
    if not any("solution" in tags(cell) for cell in notebook.code):
        yield "no cell has the tag 'solution'"


# What the cells hold


@rule
def length(notebook: Notebook) -> Iterator[str]:
    for cell in notebook.code:
        if (lines := len(source(cell).splitlines())) > 25:
            yield f"cell {cell['id']}: {lines} lines of code"


@rule
def plain_python(notebook: Notebook) -> Iterator[str]:
    """No magics, and nothing that nbval cannot follow."""
    for cell in notebook.code:
        try:
            ast.parse(source(cell))
        except SyntaxError as error:
            yield f"cell {cell['id']}: not plain Python: {error}"
        if re.search(r";\s*$", source(cell), flags=re.MULTILINE):
            yield f"cell {cell['id']}: a line ends with ';'"
        for unwanted in ("clear_output", "tqdm.auto", "tqdm.notebook", "ipywidgets"):
            if unwanted in source(cell):
                yield f"cell {cell['id']}: {unwanted}"


@rule
def links(notebook: Notebook) -> Iterator[str]:
    for cell in notebook.markdown:
        for target in dead_links(source(cell), notebook.path.parent):
            yield f"cell {cell['id']}: {target} does not exist"


@rule
def numbers(notebook: Notebook) -> Iterator[str]:
    """A decimal number in the text also stands in the code or in a compared output."""
    number = r"(?<![\w.])\d*\.?\d+(?:e[+-]?\d+)?(?!\.?\d)"
    known = "\n".join(
        [source(cell) for cell in notebook.code]
        + [text_of(output) for cell, output in notebook.outputs if not is_ignored(cell)]
    )
    values = {float(found) for found in re.findall(number, known.replace(",", " "))}
    no_result = [
        r"\$\$.*?\$\$|\$[^$]*\$",  # mathematics
        r"\[[^\]]*\]\([^)]*\)|https?://\S+|arXiv:\S+",  # links
        # numbers of sections, tables and figures
        r"(?:§+|^#+|\b(?:[Ss]ection|[Tt]able|[Ff]igure)s?)\s*\d[\d.]*(?:(?:,| and|–)\s*\d[\d.]*)*",
    ]
    for cell in notebook.markdown:
        text = re.sub("|".join(no_result), " ", prose(source(cell)), flags=re.DOTALL | re.MULTILINE)
        for found in re.findall(number, text):
            if "." in found and float(found) not in values:
                yield f"cell {cell['id']}: {found} stands in no code and in no compared output"


# What the outputs hold


@rule
def execution(notebook: Notebook) -> Iterator[str]:
    counts = [cell["execution_count"] for cell in notebook.code]
    if counts != list(range(1, len(counts) + 1)):
        yield f"the execution counts are {counts}: run `make refresh`"


@rule
def outputs(notebook: Notebook) -> Iterator[str]:
    for cell, output in notebook.outputs:
        if output["output_type"] == "error":
            yield f"cell {cell['id']}: an error"
        if output.get("name") == "stderr":
            yield f"cell {cell['id']}: stderr"
        if any("widget" in mime for mime in output.get("data", {})):
            yield f"cell {cell['id']}: a widget"
        if re.search(r"\d%\||\d(it/s|s/it)|\r", text_of(output)):
            yield f"cell {cell['id']}: a progress bar"
        if re.search(r"0x[0-9a-f]{6,}", text_of(output)):
            yield f"cell {cell['id']}: a memory address"


@rule
def alt_text(notebook: Notebook) -> Iterator[str]:
    for cell, output in notebook.outputs:
        described = output.get("metadata", {}).get("image/png", {}).get("alt")
        if "image/png" in output.get("data", {}) and not described:
            yield f"cell {cell['id']}: a figure without alt text: use show_figure"


@rule
def machine_paths(notebook: Notebook) -> Iterator[str]:
    texts = [(cell, source(cell)) for cell in notebook.cells]
    texts += [(cell, text_of(output)) for cell, output in notebook.outputs]
    for cell, text in texts:
        if found := re.search(r"(?<![\w.])/(home|root|tmp|Users|work|content)/|\b[A-Z]:\\", text):
            yield f"cell {cell['id']}: {found[0]}"


@rule
def sizes(notebook: Notebook) -> Iterator[str]:
    if (size := notebook.path.stat().st_size) >= 1_000_000:
        yield f"the notebook has {size:,} bytes"
    for cell, output in notebook.outputs:
        picture = "".join(output.get("data", {}).get("image/png", ""))
        if (size := len(base64.b64decode(picture))) >= 100_000:
            yield f"cell {cell['id']}: a picture of {size:,} bytes"


# What nbval compares


@rule
def compared(notebook: Notebook) -> Iterator[str]:
    share = 1 - sum(map(is_ignored, notebook.code)) / len(notebook.code)
    if share < 0.6:
        yield f"only {share:.0%} of the code cells are compared"


@rule
def nothing_skipped(notebook: Notebook) -> Iterator[str]:
    for cell in notebook.code:
        for tag in {"nbval-skip", "nbval-raises-exception", "raises-exception"} & set(tags(cell)):
            yield f"cell {cell['id']}: the tag {tag}"
        if re.search(r"^\s*#\s*(NBVAL_|PYTEST_VALIDATE)", source(cell), flags=re.MULTILINE):
            yield f"cell {cell['id']}: a marker of nbval in a comment"


@rule
def checked(notebook: Notebook) -> Iterator[str]:
    """A section with outputs that are not compared holds a check on what it found."""
    sections = [[]]
    for cell in notebook.cells:
        if cell["cell_type"] == "markdown" and source(cell).startswith("## "):
            sections.append([])
        sections[-1].append(cell)
    for section in sections:
        code = [cell for cell in section if cell in notebook.code]
        if not any("check(" in source(cell) for cell in code):
            for cell in filter(is_ignored, code):
                yield f"cell {cell['id']}: not compared, and its section holds no check"


# The file


@rule
def metadata(notebook: Notebook) -> Iterator[str]:
    if notebook.json["metadata"] != NOTEBOOK_METADATA:
        yield f"the notebook's metadata are {notebook.json['metadata']}: run `make refresh`"
    if (notebook.json["nbformat"], notebook.json["nbformat_minor"]) != (4, 5):
        yield "the notebook's format is not 4.5: run `make refresh`"
    for cell in notebook.cells:
        more = dict(cell["metadata"])
        more.pop("tags", None)
        if more != folding(tags(cell)):
            yield f"cell {cell['id']}: the metadata {cell['metadata']}: run `make refresh`"


@rule
def readme(notebook: Notebook) -> Iterator[str]:
    """A row of the README's table links to the notebook."""
    text = (notebook.path.parents[1] / "README.md").read_text(encoding="utf-8")
    if not re.search(rf"^\|.*\]\(notebooks/{notebook.path.name}\)", text, flags=re.MULTILINE):
        yield "no row of the README's table links to the notebook"


def main() -> int:
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    complaints = [
        f"{path.name}: {complaint}"
        for path in paths
        for rule in RULES
        for complaint in rule(Notebook(path))
    ]
    for path in {*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md")} - {*ROOT.glob("docs/*.md")}:
        for target in dead_links(path.read_text(encoding="utf-8"), path.parent):
            complaints.append(f"{path.relative_to(ROOT)}: {target} does not exist")
    print(*complaints, f"{len(paths)} notebooks, {len(complaints)} complaints", sep="\n")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
