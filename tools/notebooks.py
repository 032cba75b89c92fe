"""Run, refresh and stamp the notebooks.

python tools/notebooks.py run [NAME ...]      execute; copies and HTML pages go to build/
python tools/notebooks.py refresh [NAME ...]  execute in place and clean the stored outputs
python tools/notebooks.py stamp               write REPOSITORY into badges, set-up cells, README
"""

import argparse
import base64
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from jinja2 import DictLoader
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi

# The address of the repository stands here and nowhere else. After a change: `make stamp`.
REPOSITORY = "https://github.com/OWNER/lora-notebooks"

SETUP_CELL = """\
# Find lora_utils.py: it lies one folder up or, in Colab, in a clone of the repository.
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads must not spin
if "google.colab" in sys.modules and not Path("lora-notebooks").exists():
    address = "{repository}"
    subprocess.run(["git", "clone", "--depth", "1", address, "lora-notebooks"], check=True)
sys.path += ["..", "lora-notebooks"]"""

COLAB = "https://colab.research.google.com"
BADGE = re.compile(
    rf"\[!\[Open in Colab\]\({COLAB}/assets/colab-badge\.svg\)\]"
    rf"\({COLAB}/github/(?P<slug>[\w.-]+/[\w.-]+)/blob/main/notebooks/\w+\.ipynb\)"
)

NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# Solutions are folded in Jupyter (the first entry) and in Colab (the second).
SOLUTION_METADATA = {
    "jupyter": {"source_hidden": True, "outputs_hidden": True},
    "cellView": "form",
}

# nbconvert shows hidden cells in full; on our pages a click opens them.
PAGE_TEMPLATE = """\
{%- extends "lab/index.html.j2" -%}
{%- block codecell -%}
{%- if cell.metadata.get("jupyter", {}).get("source_hidden") -%}
<details><summary>Solution</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock codecell -%}"""

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "build"

# The README's picture is a stored figure: this notebook's, of this cell.
PICTURE = NOTEBOOKS / "picture.png"
PICTURE_FROM = ("02_lora_regression", "plot")


# The repository's address


def setup_cell() -> str:
    """The source of the set-up cell, the same in every notebook."""
    return SETUP_CELL.format(repository=REPOSITORY)


def badge(name: str) -> str:
    """The Markdown of the badge that opens the notebook `name` in Colab."""
    page = f"{COLAB}/github/{slug()}/blob/main/notebooks/{name}.ipynb"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({page})"


def slug() -> str:
    """OWNER/NAME of the repository; Colab opens notebooks from GitHub only."""
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", REPOSITORY):
        sys.exit(f"REPOSITORY must look like https://github.com/OWNER/NAME, not {REPOSITORY}")
    return REPOSITORY.removeprefix("https://github.com/")


def stamp() -> None:
    for path in find_notebooks([]):
        notebook = nbformat.read(path, as_version=4)
        first = notebook.cells[0]
        first.source, badges = BADGE.subn(badge(path.stem), first.source)
        setups = [cell for cell in notebook.cells if cell.get("id") == "setup"]
        if badges != 1 or len(setups) != 1:
            sys.exit(f"{path.name}: needs one badge in its first cell and one cell 'setup'")
        setups[0].source = setup_cell()
        write(path, nbformat.writes(notebook) + "\n")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    old = BADGE.search(text)
    if not old:
        sys.exit("README.md: needs a Colab badge, from which the old address is read")
    link = re.compile(rf"(?<=/){re.escape(old['slug'])}(?![\w-])")
    write(readme, link.sub(slug(), text))


# Running


def run(names: list[str]) -> bool:
    """Execute the notebooks into build/; True if all of them passed."""
    BUILD.mkdir(exist_ok=True)
    exporter = HTMLExporter(
        extra_loaders=[DictLoader({"page.html.j2": PAGE_TEMPLATE})], template_file="page.html.j2"
    )
    passed = True
    for path in find_notebooks(names):
        notebook = nbformat.read(path, as_version=4)
        passed &= execute(path.stem, notebook)
        write(BUILD / path.name, nbformat.writes(notebook) + "\n")
        page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": path.stem}})
        page = re.sub(r'href="([\w.-]+)\.ipynb(?=["#])', r'href="\1.html', page)
        write(BUILD / f"{path.stem}.html", page)
    print(f"The executed notebooks and their HTML pages are in {BUILD.name}/")
    return passed


def refresh(names: list[str]) -> bool:
    """Execute the notebooks in place; one that fails stays as it was."""
    os.environ["OMP_NUM_THREADS"] = "1"  # more threads add up in another order
    passed = True
    for path in find_notebooks(names):
        notebook = nbformat.read(path, as_version=4)
        if execute(path.stem, notebook):
            clean(notebook)
            write(path, nbformat.writes(notebook) + "\n")
            if path.stem == PICTURE_FROM[0]:
                PICTURE.write_bytes(figure(notebook, PICTURE_FROM[1]))
        else:
            passed = False
    return passed


def figure(notebook: nbformat.NotebookNode, cell_id: str) -> bytes:
    """The PNG stored in the outputs of a cell."""
    [cell] = [cell for cell in notebook.cells if cell.id == cell_id]
    [png] = [out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", {})]
    return base64.b64decode(png)


def execute(name: str, notebook: nbformat.NotebookNode) -> bool:
    """Run all cells, as far as they go, and report; True if none failed."""
    print(f"{name} ...", end=" ", flush=True)
    start = time.perf_counter()
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": NOTEBOOKS}},
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # no warnings of the kernel about its transport
    )
    try:
        client.execute()
    except Exception as error:  # a failed cell, a time-out, a dead kernel: go on with the next
        print(f"FAILED\n{strip_ansi(str(error))}", flush=True)
        return False
    print(f"{time.perf_counter() - start:.1f} s", flush=True)
    return True


def clean(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs from run to run or from editor to editor."""
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    notebook.nbformat_minor = 5
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            cell.outputs = clean_outputs(cell.outputs)
            if "solution" in tags:
                metadata |= SOLUTION_METADATA
        cell.metadata = nbformat.from_dict(metadata)


def clean_outputs(outputs: list) -> list:
    """Outputs without stderr and widgets, one stream where several pieces followed each other."""
    kept = []
    for output in outputs:
        is_stream = output.output_type == "stream"
        if is_stream and output.name == "stderr":
            continue
        if any("widget" in mime for mime in output.get("data", {})):
            continue
        if is_stream and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def find_notebooks(names: list[str]) -> list[Path]:
    """The notebooks of these names, or all of them, in order."""
    paths = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    if not paths:
        sys.exit(f"there are no notebooks in {NOTEBOOKS}")
    stems = [Path(name).stem for name in names] or list(paths)
    if unknown := [stem for stem in stems if stem not in paths]:
        sys.exit(f"no such notebook: {', '.join(unknown)}; there are {', '.join(paths)}")
    return [paths[stem] for stem in stems]


def write(path: Path, text: str) -> None:
    """Write by way of a temporary file, so that a file is old or new, never half."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "refresh", "stamp"])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all notebooks")
    options = parser.parse_args(arguments)
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the set-up cell
    if options.command == "stamp":
        stamp()
        return 0
    command = {"run": run, "refresh": refresh}[options.command]
    return 0 if command(options.names) else 1


if __name__ == "__main__":
    sys.exit(main())
