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
DOCS = ROOT / "docs"
sys.path += [str(ROOT), str(DOCS)]
from conf import SITE  # noqa: E402
from heads import meta  # noqa: E402

from conventions import FIGURE, Notebook, figure_of, source  # noqa: E402
from playground import inline, language, page  # noqa: E402

NOTEBOOKS = ROOT / "notebooks"
SOURCE = ROOT / "build" / "site-source"
STORED = ROOT / "data" / "playground.safetensors"
LANGUAGE = ROOT / "data" / "language_playground.safetensors"

BADGE = re.compile(r"^\[!\[Open in Colab\].*\n+", flags=re.MULTILINE)  # the theme has a button
NEIGHBOURS = re.compile(r"^(Previous|Next): \[.*\n*", flags=re.MULTILINE)  # and arrows
PREDICT = re.compile(r"(?<=\n\n)(?=\*\*Predict)|\A(?=\*\*Predict)")
HEADING = re.compile(r"(```.*?```)|^(#+ )", flags=re.DOTALL | re.MULTILINE)  # outside of code
TITLE = re.compile(r"\A# @title (.*)\n")  # the first line of a folded cell
MINUTES = re.compile(r"\*\*Reading time\*\* (\d+ minutes)")
PART = re.compile(r"^\| \*\*\w+\*\* \| \*\*(.+?)\*\*")  # a row of the README's table
ENTRY = re.compile(r"^\| \d+ \| \[.+?\]\(notebooks/(\w+)\.ipynb\) \| (.+?) \|")
ICONS = re.compile(
    r"^ *<script defer src=\"[./]*_static/scripts/fontawesome.*\n", flags=re.MULTILINE
)
GLYPHS = re.compile(r"@font-face\{.*?\}|\.fa-[^{}]*\{--fa:[^{}]*\}")
UNUSED = ("**/*.map", "scripts/fontawesome*", "vendor", "locales")  # half of the theme's megabytes


def build(folder: Path) -> int:
    """Build the site into a folder; return the status of Sphinx, which is not 0 after a warning."""
    prepare()
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", SOURCE, folder]
    status = subprocess.run(command, check=False).returncode
    lighten(folder)
    return status


def prepare() -> None:
    """Write what Sphinx reads into SOURCE."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(DOCS, SOURCE, ignore=shutil.ignore_patterns("__pycache__"))
    (SOURCE / "deeper").mkdir()
    shutil.copy(ROOT / "playground" / "icon.svg", SOURCE / "_static" / "favicon.svg")
    main = {path.stem: read(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    below: dict[str, list[str]] = {name: [] for name in main}
    minutes = {}
    for path in sorted(NOTEBOOKS.glob("deeper/*.ipynb")):
        above = next(name for name in main if name[:2] == path.stem[:2])
        below[above].append(f"deeper/{path.stem}")
        notebook = read(path)
        minutes[f"deeper/{path.stem}"] = MINUTES.search(notebook.cells[0].source)
        nbformat.write(notebook, SOURCE / "deeper" / path.name)
    for name, notebook in main.items():
        minutes[name] = MINUTES.search(notebook.cells[0].source)
        if below[name]:
            tree = "\n".join(below[name])
            cell = nbformat.v4.new_markdown_cell(f"```{{toctree}}\n:hidden:\n\n{tree}\n```")
            notebook.cells.append(cell)
        nbformat.write(notebook, SOURCE / f"{name}.ipynb")
    with (SOURCE / "index.md").open("a", encoding="utf-8") as index:
        index.write(contents(below, minutes))
    write_claims(SOURCE / "claims.md")
    write_tools(SOURCE / "extra")
    for file in metadata.files("sphinx-mathjax-offline"):  # of 24 MB the pages need 2
        path = str(file).partition("static/")[2]
        if path == "mathjax/tex-chtml.js" or path.startswith("mathjax/output/chtml/fonts/woff-v2"):
            (SOURCE / "_static" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), SOURCE / "_static" / path)


def read(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with the site's tags and marks."""
    notebook = nbformat.read(path, as_version=4)
    join_set_up(notebook)
    leave_one_title(notebook)
    for cell in notebook.cells:
        adapt(cell)
    return notebook


def lighten(folder: Path) -> None:
    """Take out what the theme brings and no page needs. docs/_static/icons.css draws its icons.

    The marks that unfold a list of deeper notebooks have no name in the theme: they get one.
    """
    for path in folder.rglob("*.html"):
        text = ICONS.sub("", path.read_text(encoding="utf-8"))
        text = text.replace("<summary><span", '<summary aria-label="Deeper notebooks"><span')
        path.write_text(text, encoding="utf-8", newline="\n")
    static = folder / "_static"
    styles = static / "styles" / "pydata-sphinx-theme.css"
    styles.write_text(GLYPHS.sub("", styles.read_text(encoding="utf-8")), encoding="utf-8")
    for pattern in UNUSED:
        for path in static.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_tools(folder: Path) -> None:
    """Write the pages that Sphinx does not make: those to touch, and the one for lost readers."""
    folder.mkdir(parents=True, exist_ok=True)
    terms = base64.b64encode(safetensors.numpy.save(svd_terms(photograph()))).decode()
    home = f'href="/{SITE.split("/", 3)[3]}/index.html"'  # a lost reader may be in any folder
    pages = {
        "playground": page(STORED.read_bytes()),
        "language": language.page(LANGUAGE.read_bytes()),
        "memory": inline("memory.html"),
        "rank": inline("rank.html").replace("<!-- stored -->", terms),
        "404": inline("404.html").replace('href="index.html"', home),
    }
    for name, text in pages.items():
        title = re.search("<title>(.*?)</title>", text)[1]
        lead = re.search('<p class="lead">(.*?)</p>', text, re.S)[1]
        lead = " ".join(re.sub("<.*?>", "", lead).replace("&nbsp;", " ").split())
        picture = f"{SITE}/_static/{name if name == 'playground' else 'language'}.png"
        card = meta(title, lead, f"{SITE}/{name}.html", picture)
        text = text.replace("<!-- meta -->", card).replace('id="home" hidden', 'id="home"')
        text = re.sub(r'href="(\d\d)\.html"', lambda n: f'href="{named(n[1])}.html"', text)
        (folder / f"{name}.html").write_text(text, encoding="utf-8", newline="\n")


def write_claims(path: Path) -> None:
    """Complete the page of claims: a table of verdicts, and figures taken from the notebooks."""
    text = path.read_text(encoding="utf-8")
    rows = ["| people say | measured |", "|---|---|"]
    for claim, verdict in re.findall(r"^## (.*)\n\n\*\*(.*?)\*\*", text, flags=re.MULTILINE):
        rows.append(f"| [{claim}](#{slug(claim)}) | {verdict} |")
    text = text.replace("<!-- verdicts -->", "\n".join(rows))
    path.write_text(FIGURE.sub(lambda place: measured(*place.groups()), text), encoding="utf-8")


def measured(name: str, cell: str) -> str:
    """Markdown for the figure of a notebook's cell, and for the section where it was measured."""
    notebook = Notebook(NOTEBOOKS / f"{name}.ipynb")
    figure = figure_of(notebook, cell)
    image = SOURCE / "claims" / f"{Path(name).name}-{cell}.png"
    image.parent.mkdir(exist_ok=True)
    image.write_bytes(base64.b64decode("".join(figure["data"]["image/png"])))
    before = notebook.cells[: [one["id"] for one in notebook.cells].index(cell)]
    texts = [source(one) for one in before if one["cell_type"] == "markdown"]
    title, *_, section = re.findall(r"^##? (.*)", "\n".join(texts), flags=re.MULTILINE)
    alt = re.sub(r"([\[\]*_`])", r"\\\1", figure["metadata"]["image/png"]["alt"])
    link = f"[{title}: {section}]({name}.ipynb#{slug(section)})"
    return f"![{alt}](claims/{image.name})\n\nMeasured in {link}"


def slug(heading: str) -> str:
    """The anchor that MyST gives to a heading: its words, without mathematics."""
    return re.sub(r"\$.*?\$|[^\w\- ]", "", heading.lower()).replace(" ", "-")


def named(number: str) -> str:
    """Return the name of the main notebook with this number, or of the first page."""
    return next((path.stem for path in NOTEBOOKS.glob(f"{number}_*.ipynb")), "index")


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


def contents(below: dict[str, list[str]], minutes: dict[str, re.Match | None]) -> str:
    """Markdown for the first page: all notebooks, in the parts that the README's table has.

    A notebook that the table lacks stands at the end of the part before it. `below` has the deeper
    notebooks of each main one, `minutes` the time that each takes to read, where it says so.
    """
    part_of, question_of, part = {}, {}, "The notebooks"
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if found := PART.match(line):
            part = found[1]
        elif found := ENTRY.match(line):
            part_of[found[1]], question_of[found[1]] = part, found[2]
    parts: dict[str, list[str]] = {}
    for name in below:
        part = part_of.get(name) or next(reversed(parts), part)
        parts.setdefault(part, []).append(name)
    text = ""
    for part, names in parts.items():
        tree = "\n".join(names)
        text += f"\n```{{toctree}}\n:hidden:\n:caption: {part}\n\n{tree}\n```\n\n**{part}**\n\n"
        for name in names:
            time = {page: f" · {found[1]}" if found else "" for page, found in minutes.items()}
            text += f"- {{doc}}`{name}`{time[name]}  \n  {question_of.get(name, '')}\n"
            text += "".join(f"  - Deeper: {{doc}}`{page}`{time[page]}\n" for page in below[name])
    return text


def join_set_up(notebook: nbformat.NotebookNode) -> None:
    """Make one cell of the set-up cell and the imports that follow it."""
    first = next(cell for cell in notebook.cells if cell.id == "setup")
    rest = notebook.cells[notebook.cells.index(first) + 1 :]
    while rest and rest[0].id.startswith("imports"):
        first.source += f"\n\n{rest[0].source}"
        notebook.cells.remove(rest.pop(0))


def leave_one_title(notebook: nbformat.NotebookNode) -> None:
    """Where a notebook has acts with titles of their own, let all headings move down by one."""
    texts = [cell for cell in notebook.cells[1:] if cell.cell_type == "markdown"]
    if any(level == "# " for cell in texts for _, level in HEADING.findall(cell.source)):
        for cell in texts:
            cell.source = HEADING.sub(lambda found: found[1] or f"#{found[2]}", cell.source)


def adapt(cell: nbformat.NotebookNode) -> None:
    """Fold what is folded, mark each "Predict.", describe figures, drop what the theme has."""
    if cell.cell_type == "markdown":
        text = NEIGHBOURS.sub("", BADGE.sub("", cell.source))
        cell.source = PREDICT.sub("% predict\n\n", text)  # a comment, for docs/folds.py
        return
    tags, look = cell.metadata.setdefault("tags", []), cell.metadata.setdefault("mystnb", {})
    title = TITLE.match(cell.source)
    cell.source = TITLE.sub("", cell.source)
    folds = {
        "solution": ("hide-cell", "Solution"),
        "promises": ("hide-cell", "What this notebook promises"),
        "folded": ("hide-input", title[1] if title else "Code"),
        "setup": ("hide-input", "Set-up and imports"),
    }
    for name in folds.keys() & {*tags, cell.id}:
        tag, look["code_prompt_show"] = folds[name]
        look["code_prompt_hide"] = look["code_prompt_show"]
        tags.append(tag)
    for output in cell.outputs:
        if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
            look["image"] = {"alt": alt}


def keep(written: Path = NOTEBOOKS / "playground.html") -> None:
    """Take the numbers out of the page that notebook 4 wrote, and keep them in STORED."""
    pieces = re.findall(r'class="stored">([^<]+)<', written.read_text(encoding="utf-8"))
    STORED.write_bytes(base64.b64decode("".join(pieces)))


if __name__ == "__main__":
    if sys.argv[1:] == ["keep"]:
        keep()
    else:
        sys.exit(build(Path(*sys.argv[1:] or [ROOT / "build" / "site"])))
