"""Check what all notebooks keep to, and measure how long the main ones take to read.

python tools/conventions.py    print all complaints and a table; the status is 1 after a complaint

Nothing is executed. A rule is a function that takes a Notebook and yields a complaint for each
fault. What ruff, nbval, pre-commit and Sphinx check is left to them.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RULES = []

COLAB = "https://colab.research.google.com"
REPOSITORY = "OWNER/lora-notebooks"  # on GitHub
SEED = r"^SEED = 0$"  # the line that `make seeds` replaces
MINUTES = re.compile(r"\*\*Reading time\*\* (\d+) minute")

NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# Tags fold: in Jupyter ("jupyter") and in Colab ("cellView"). The output that answers a "Predict."
# is folded in Jupyter alone, where running the cell opens it. Hosting sites show everything.
BOTH = {"jupyter": {"source_hidden": True, "outputs_hidden": True}, "cellView": "form"}
FOLDED = {
    "solution": BOTH,
    "promises": BOTH,
    "folded": {"jupyter": {"source_hidden": True}, "cellView": "form"},
    "answer": {"jupyter": {"outputs_hidden": True}},
    "nbval-check-output": {},
}


def folding(tags: list[str]) -> dict:
    """The metadata of a cell with these tags, beside the tags themselves."""
    metadata = {}
    for tag in tags:
        for key, value in FOLDED.get(tag, {}).items():
            metadata[key] = metadata.get(key, {}) | value if key == "jupyter" else value
    return metadata


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
        self.opening = source(self.cells[0])
        self.is_deeper = path.parent.name == "deeper"
        self.main_path = path.parent.parent if self.is_deeper else path.parent


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def texts(cell: dict) -> str:
    """Everything in the outputs of a cell that can be read; no pictures."""
    parts = []
    for output in cell["outputs"]:
        parts += [output.get("text", "")]
        parts += [data for kind, data in output.get("data", {}).items() if kind.startswith("text/")]
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


# How a notebook opens and closes


@rule
def opening(notebook: Notebook) -> Iterator[str]:
    """The first cell holds these parts, in this order."""
    name = f"deeper/{notebook.path.name}" if notebook.is_deeper else notebook.path.name
    page = f"{COLAB}/github/{REPOSITORY}/blob/main/notebooks/{name}"
    badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({page})"
    parts = ["# ", badge]
    if not notebook.is_deeper:
        parts += ["**After this you know that**", "**You need**", "**Reading time**"]
    rest = notebook.opening
    if notebook.cells[0]["cell_type"] != "markdown" or not rest.startswith("# "):
        yield "the first cell is not Markdown that starts with a title"
    for part in [*parts, "**Run time**"]:
        before, found, rest = rest.partition(part)
        if not found:
            yield f"the first cell lacks {part!r}, or has it in another order"
            rest = before


@rule
def neighbours(notebook: Notebook) -> Iterator[str]:
    """Main notebooks link to those before and after; main and deeper ones of a number likewise."""
    main = sorted(path.name for path in notebook.main_path.glob("*.ipynb"))
    number = notebook.path.name.partition("_")[0]
    if notebook.is_deeper:
        followed = [name for name in main if name.startswith(f"{number}_")]
        if not any(f"](../{name})" in notebook.opening for name in followed):
            yield f"the first cell does not link to the main notebook that it follows: {followed}"
        return
    here = main.index(notebook.path.name)
    for name in main[max(here - 1, 0) : here] + main[here + 1 : here + 2]:
        if f"]({name})" not in notebook.opening:
            yield f"the first cell does not link to {name}"
    for path in notebook.main_path.glob(f"deeper/{number}_*.ipynb"):
        if not any(f"](deeper/{path.name})" in source(cell) for cell in notebook.markdown):
            yield f"no cell links to deeper/{path.name}"


@rule
def closing(notebook: Notebook) -> Iterator[str]:
    needed = ["You have seen"] if notebook.is_deeper else ["You have seen", "On Monday"]
    for words in needed:
        if not any(words in source(cell) for cell in notebook.markdown):
            yield f"no Markdown cell says {words!r}"
    if not notebook.is_deeper and not any("solution" in tags(cell) for cell in notebook.code):
        yield "no cell has the tag `solution`"


@rule
def setup(notebook: Notebook) -> Iterator[str]:
    """The first code cell is the set-up cell, as in the first notebook."""
    model = Notebook(min(notebook.main_path.glob("*.ipynb"))).code[0]
    first = notebook.code[0]
    if (first["id"], source(first)) != ("setup", source(model)):
        yield "the first code cell is not the set-up cell of the first notebook"


@rule
def seeded(notebook: Notebook) -> Iterator[str]:
    """All that is random follows from one line, which `make seeds` replaces."""
    declared = [cell["id"] for cell in notebook.code if re.search(SEED, source(cell), flags=re.M)]
    if declared != ["imports"]:
        yield f"the line SEED = 0 stands in {declared}, not in the cell `imports` alone"
    for cell in notebook.code:
        if found := re.search(r"(manual_seed|default_rng|\bseed=)\(?\d+", source(cell)):
            yield f"cell {cell['id']}: {found[0]} does not follow from SEED"


@rule
def promises(notebook: Notebook) -> Iterator[str]:
    """A main notebook ends with a cell that asserts its claims; a deeper one asserts anywhere."""
    last = notebook.cells[-1]
    if notebook.is_deeper:
        if not any("check(" in source(cell) for cell in notebook.code):
            yield "no cell checks a claim"
    elif "promises" not in tags(last) or "check(" not in source(last):
        yield "the last cell is not tagged `promises`, or checks nothing"


# What the cells hold


@rule
def links(notebook: Notebook) -> Iterator[str]:
    for cell in notebook.markdown:
        for target in dead_links(source(cell), notebook.path.parent):
            yield f"cell {cell['id']}: {target} does not exist"


@rule
def numbers(notebook: Notebook) -> Iterator[str]:
    """A decimal number in the text also stands in the code or in a stored output."""
    number = r"(?<![\w.])\d*\.?\d+(?:e[+-]?\d+)?(?!\.?\d)"
    known = "\n".join(source(cell) + "\n" + texts(cell) for cell in notebook.code)
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
                yield f"cell {cell['id']}: {found} stands in no code and in no stored output"


def drawn_by(body: list[ast.stmt], known: set[str]) -> bool:
    """Whether these statements, when they run, call a function that shows a figure."""
    todo: list[ast.AST] = list(body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in known:
            return True
        if not isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            todo += ast.iter_child_nodes(node)
    return False


def drawing(code: str, known: set[str]) -> set[str]:
    """The functions known to show a figure, and those defined in this code that call one."""
    found = set(known)
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef) and drawn_by(node.body, found):
            found.add(node.name)
    return found


@rule
def figures(notebook: Notebook) -> Iterator[str]:
    """A cell that shows a figure stores it as PNG, with a description."""
    code = (notebook.main_path.parent / "lora_show.py").read_text(encoding="utf-8")
    known = drawing(code, {"show_figure"})
    for cell in notebook.code:
        known = drawing(source(cell), known)
        stored = [out for out in cell["outputs"] if "image/png" in out.get("data", {})]
        if not stored and drawn_by(ast.parse(source(cell)).body, known):
            yield f"cell {cell['id']}: its figure is not stored as PNG: run `make refresh`"
        for output in stored:
            if not output["metadata"].get("image/png", {}).get("alt"):
                yield f"cell {cell['id']}: a figure without alt text: use show_figure"


@rule
def machine_paths(notebook: Notebook) -> Iterator[str]:
    for cell in notebook.code:
        both = source(cell) + texts(cell)
        if found := re.search(r"(?<![\w.])/(home|root|tmp|Users|work|content)/|\b[A-Z]:\\", both):
            yield f"cell {cell['id']}: {found[0]}"


@rule
def metadata(notebook: Notebook) -> Iterator[str]:
    """Known tags alone, folded as they say."""
    if notebook.json["metadata"] != NOTEBOOK_METADATA:
        yield f"the notebook's metadata are {notebook.json['metadata']}: run `make refresh`"
    for cell in notebook.cells:
        if unknown := set(tags(cell)) - set(FOLDED):
            yield f"cell {cell['id']}: the tags {unknown}"
        if {"tags": tags(cell)} | cell["metadata"] != {"tags": tags(cell)} | folding(tags(cell)):
            yield f"cell {cell['id']}: folded otherwise than tagged: run `make refresh`"


@rule
def minutes(notebook: Notebook) -> Iterator[str]:
    """A main notebook says how long it takes to read: what is measured below, within a quarter."""
    if notebook.is_deeper:
        return
    takes = reading(notebook)["minutes"]
    said = MINUTES.search(notebook.opening)
    if not said or abs(int(said[1]) - takes) > 1 + takes / 4:
        yield f"the first cell does not say that reading takes about {takes:.0f} minutes"


@rule
def readme(notebook: Notebook) -> Iterator[str]:
    """A row of the README's table links to each main notebook, and gives its reading time."""
    text = (notebook.main_path.parent / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"^\|.*\]\(notebooks/{notebook.path.name}\).*", text, flags=re.MULTILINE)
    said = MINUTES.search(notebook.opening)
    if notebook.is_deeper:
        return
    if not row:
        yield "no row of the README's table links to the notebook"
    elif said and f"| {said[1]} |" not in row[0]:
        yield f"the README's row does not say {said[1]} minutes"


# The page of claims


# The figure of a notebook's cell
FIGURE = re.compile(r"^!\[\]\((\S+)\.ipynb#(\S+)\)$", flags=re.MULTILINE)


def figure_of(notebook: Notebook, name: str) -> dict | None:
    """The output of this cell that is a figure."""
    outputs = [out for cell in notebook.code if cell["id"] == name for out in cell["outputs"]]
    return next((out for out in outputs if "image/png" in out.get("data", {})), None)


def numbers_in(text: str) -> set[str]:
    """The numbers of a text without commas, each with its per cent sign."""
    found = re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:\s?%)?", text)
    return {re.sub(r"[,\s]", "", number) for number in found}


def claims(page: str, notebooks: Path) -> Iterator[str]:
    """Each claim has a verdict, a scope and one stored figure; its numbers stand in the notebook.

    The code of a notebook does not count: what was measured stands in its text or its outputs.
    """
    head, *entries = re.split(r"^## ", page, flags=re.MULTILINE)
    if found := numbers_in(head):
        yield f"before the first claim: the numbers {found} belong to no notebook"
    for entry in entries:
        claim, _, text = entry.partition("\n")
        verdict = re.match(r"\s*\*\*(.+?)\*\*", text)
        if not verdict or len(verdict[1].split()) > 7:
            yield f"{claim}: it does not begin with a verdict of seven words or fewer, in bold"
        if "*Scope: " not in text:
            yield f"{claim}: no scope"
        places = FIGURE.findall(text)
        path = notebooks / f"{places[0][0]}.ipynb" if places else notebooks / "missing"
        if len(places) != 1 or not path.exists():
            yield f"{claim}: not one figure of a notebook that exists: {places}"
            continue
        notebook = Notebook(path)
        if not figure_of(notebook, places[0][1]):
            yield f"{claim}: {path.name} stores no figure in a cell {places[0][1]}"
        known = [prose(source(cell)) for cell in notebook.markdown] + [
            texts(cell) for cell in notebook.code
        ]
        said = numbers_in(re.sub(r"\]\([^)]*\)", "]", entry))  # without the targets of links
        for number in sorted(said - numbers_in("\n".join(known))):
            yield f"{claim}: {path.name} does not hold the number {number}"


# How long it takes to read


COUNTS = ("cells", "words", "code", "figures", "predicts", "ticks", "minutes")
AIMS = (40, 1500, 150, 7, 5, 8, 25)  # not checked: a table for those who write


def reading(notebook: Notebook) -> dict[str, float]:
    """What a reader meets, without set-up, imports, exercises, references and whatever is folded.

    The minutes are those of fresh readers: 180 words or 15 lines of open code a minute, 36 seconds
    for a figure and a minute for each Predict.
    """
    met, code, text, skipped = 0, [], "", False
    for cell in notebook.cells:
        kept = ""
        for part in re.split(r"^(?=## )", source(cell), flags=re.MULTILINE):
            if heading := re.match(r"## (.*)", part):
                skipped = heading[1].startswith(("Exercise", "References"))
            kept += "" if skipped else part
        if not kept or cell["id"] in ("setup", "imports"):
            continue
        met += 1
        if cell["cell_type"] == "markdown":
            text += kept + "\n"
        elif "promises" not in tags(cell):
            code.append(cell)
    skip = r"<details>.*?</details>|\$\$.*?\$\$|\$[^$\n]+\$|\]\([^)\n]*\)"
    text = re.sub(skip, " x ", text, flags=re.DOTALL)
    counts = {
        "cells": met,
        "words": len(re.findall(r"\S*\w\S*", text)),
        "code": sum(source(c).count("\n") + 1 for c in code if "folded" not in tags(c)),
        "figures": sum("image/png" in out.get("data", {}) for c in code for out in c["outputs"]),
        "predicts": text.count("**Predict"),
        "ticks": sum(texts(cell).count("✓") for cell in code),
    }
    looking = 0.6 * counts["figures"] + counts["predicts"]
    counts["minutes"] = counts["words"] / 180 + counts["code"] / 15 + looking
    return counts


def main() -> int:
    main_path = sorted((ROOT / "notebooks").glob("*.ipynb"))
    paths = main_path + sorted((ROOT / "notebooks" / "deeper").glob("*.ipynb"))
    complaints = [
        f"{path.name}: {complaint}"
        for path in paths
        for rule in RULES
        for complaint in rule(Notebook(path))
    ]
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    complaints += [f"claims.md: {fault}" for fault in claims(page, ROOT / "notebooks")]
    for path in {*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md")} - {*ROOT.glob("docs/*.md")}:
        for target in dead_links(path.read_text(encoding="utf-8"), path.parent):
            complaints.append(f"{path.relative_to(ROOT)}: {target} does not exist")
    rows = {path.stem: reading(Notebook(path)) for path in main_path}
    rows["to aim at"] = dict(zip(COUNTS, AIMS, strict=True))
    print(f"{'to read':32}", *(f"{name:>8}" for name in COUNTS))
    for name, counts in rows.items():
        print(f"{name:32}", *(f"{counts[count]:8.0f}" for count in COUNTS))
    print(*complaints, f"{len(paths)} notebooks, {len(complaints)} complaints", sep="\n")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
