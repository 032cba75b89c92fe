"""Build the site: the notebooks as pages with their stored outputs, and the playground.

python tools/pages.py [FOLDER]   build; the default folder is build/site
python tools/pages.py keep       keep the network of notebook 4's last run for the site's playground

Nothing is executed. The notebooks are copied to build/site-source with the tags and marks that
the site needs, and Sphinx makes pages of them; docs/ holds its settings.
"""

import base64
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import safetensors.numpy
from matplotlib.cbook import get_sample_data

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from playground import inline, page  # noqa: E402

NOTEBOOKS, DOCS = ROOT / "notebooks", ROOT / "docs"
SOURCE = ROOT / "build" / "site-source"
STORED = ROOT / "data" / "playground.safetensors"

BADGE = re.compile(r"^\[!\[Open in Colab\].*\n+", flags=re.MULTILINE)  # the theme has a button
NEIGHBOURS = re.compile(r"^(Previous|Next): \[.*\n*", flags=re.MULTILINE)  # and arrows
PREDICT = re.compile(r"(?<=\n\n)(?=[^\n]*\*\*Predict)|\A(?=[^\n]*\*\*Predict)")
PART = re.compile(r"^\| \*\*\w+\*\* \| \*\*(.+?)\*\*")  # a row of the README's table
ENTRY = re.compile(r"^\| \d+ \| \[.+?\]\(notebooks/(\w+)\.ipynb\) \| (.+?) \|")


def build(folder: Path) -> int:
    """Build the site into a folder; return the status of Sphinx, which is not 0 after a warning."""
    prepare()
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", SOURCE, folder]
    return subprocess.run(command, check=False).returncode


def prepare() -> None:
    """Write what Sphinx reads into SOURCE."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(DOCS, SOURCE)
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        join_set_up(notebook)
        for cell in notebook.cells:
            adapt(cell)
        nbformat.write(notebook, SOURCE / path.name)
    with (SOURCE / "index.md").open("a", encoding="utf-8") as index:
        index.write(contents())
    extra = SOURCE / "extra"
    extra.mkdir()
    for_the_site = page(STORED.read_bytes()).replace('id="home" hidden', 'id="home"')
    (extra / "playground.html").write_text(for_the_site, encoding="utf-8", newline="\n")
    write_tools(extra)
    for file in metadata.files("sphinx-mathjax-offline"):  # of 24 MB the pages need 2
        path = str(file).partition("static/")[2]
        if path == "mathjax/tex-chtml.js" or path.startswith("mathjax/output/chtml/fonts/woff-v2"):
            (SOURCE / "_static" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), SOURCE / "_static" / path)


def write_tools(folder: Path) -> None:
    """Write the two pages beside the playground: the memory calculator and the rank slider."""
    memory = inline("memory.html")
    (folder / "memory.html").write_text(memory, encoding="utf-8", newline="\n")
    terms = base64.b64encode(safetensors.numpy.save(svd_terms(photograph()))).decode()
    rank = inline("rank.html").replace("<!-- stored -->", terms)
    (folder / "rank.html").write_text(rank, encoding="utf-8", newline="\n")


def photograph() -> np.ndarray:
    """Return the photograph of notebook 1: 600 × 512 whole steps of grey, from 0 to 255."""
    with get_sample_data("grace_hopper.jpg") as file:
        return plt.imread(file, format="jpg").mean(axis=2).round().astype(np.uint8)


def svd_terms(photo: np.ndarray) -> dict[str, np.ndarray]:
    """Return the terms of a photograph's SVD, rounded, each a column and a row with their scales.

    The first 64 terms, which are large, have 16 bits a number, the others 8. √σ goes into both.
    """
    U, S, Vh = np.linalg.svd(photo.astype(float), full_matrices=False)
    sides = [(U * np.sqrt(S)).T, Vh * np.sqrt(S)[:, None]]  # a term in each row
    steps = np.where(np.arange(len(S)) < 64, 32767, 127)
    scales = [np.abs(side).max(axis=1) / steps for side in sides]
    rounded = np.hstack(
        [(side / s[:, None]).round() for side, s in zip(sides, scales, strict=True)]
    )
    return {
        "photo": photo,
        "sigma": S.astype(np.float32),
        "scales": np.stack(scales, axis=1).astype(np.float32),
        "fine": rounded[:64].astype(np.int16),
        "coarse": rounded[64:].astype(np.int8),
    }


def contents() -> str:
    """Markdown for the first page: all notebooks, in the parts that the README's table has.

    A notebook that the table lacks stands at the end of the part before it.
    """
    part_of, question_of, part = {}, {}, "The notebooks"
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if found := PART.match(line):
            part = found[1]
        elif found := ENTRY.match(line):
            part_of[found[1]], question_of[found[1]] = part, found[2]
    parts: dict[str, list[str]] = {}
    for name in sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")):
        part = part_of.get(name) or next(reversed(parts), part)
        parts.setdefault(part, []).append(name)
    text = ""
    for part, names in parts.items():
        tree = "\n".join(names)
        text += f"\n```{{toctree}}\n:hidden:\n:caption: {part}\n\n{tree}\n```\n\n**{part}**\n\n"
        text += "".join(f"- {{doc}}`{n}`  \n  {question_of.get(n, '')}\n" for n in names)
    return text


def join_set_up(notebook: nbformat.NotebookNode) -> None:
    """Make one cell of the set-up cell and the imports that follow it."""
    first = next(cell for cell in notebook.cells if cell.id == "setup")
    rest = notebook.cells[notebook.cells.index(first) + 1 :]
    while rest[0].id.startswith("imports"):
        first.source += f"\n\n{rest[0].source}"
        notebook.cells.remove(rest.pop(0))


def adapt(cell: nbformat.NotebookNode) -> None:
    """Fold solutions, mark each "Predict.", describe figures, drop what the theme has itself."""
    if cell.cell_type == "markdown":
        text = NEIGHBOURS.sub("", BADGE.sub("", cell.source))
        cell.source = PREDICT.sub("% predict\n\n", text)  # a comment, for docs/folds.py
        return
    tags, look = cell.metadata.setdefault("tags", []), cell.metadata.setdefault("mystnb", {})
    if "solution" in tags:
        tags.append("hide-cell")
        look["code_prompt_show"] = look["code_prompt_hide"] = "Solution"
        cell.source = re.sub(r"\A# @title .*\n", "", cell.source)
    elif cell.id == "setup":
        tags.append("hide-input")
        look["code_prompt_show"] = look["code_prompt_hide"] = "Set-up and imports"
    for output in cell.outputs:
        if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
            look["image"] = {"alt": alt}


def keep(written: Path = NOTEBOOKS / "playground.html") -> None:
    """Take the numbers out of the page that notebook 4 wrote, and keep them in STORED."""
    found = re.search(r'id="stored">([^<]+)<', written.read_text(encoding="utf-8"))
    STORED.write_bytes(base64.b64decode(found[1]))


if __name__ == "__main__":
    if sys.argv[1:] == ["keep"]:
        keep()
    else:
        sys.exit(build(Path(*sys.argv[1:] or [ROOT / "build" / "site"])))
