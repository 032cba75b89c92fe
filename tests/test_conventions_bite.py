"""Each convention can fail: a fault is planted in a good notebook, and its rule reports it."""

import base64
import json

import pytest

from conventions import RULES, Notebook
from tools import notebooks as tool

NAME = "02_good"


def markdown(name, text):
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}


def code(name, count, text, *tags, printed="", **metadata):
    outputs = [{"output_type": "stream", "name": "stdout", "text": printed}] if printed else []
    metadata = {"tags": list(tags), **metadata} if tags else metadata
    return {
        "cell_type": "code",
        "id": name,
        "metadata": metadata,
        "source": text,
        "execution_count": count,
        "outputs": outputs,
    }


def good_notebook():
    opening = (
        f"# Good\n{tool.badge(NAME)}\n"
        "**You will** see. **You need** little. **Run time** short.\n"
        "[before](01_before.ipynb) [after](03_after.ipynb)"
    )
    closing = (
        "You have seen 0.25 and $0.7$, `0.8`, [1.5](https://a.b/2.5), §4.1, "
        "Sections 7.2 and 7.3, table 2.1."
    )
    cells = [
        markdown("opening", opening),
        code("setup", 1, tool.setup_cell()),
        code("exact", 2, "print(1 / 4)", printed="0.25\n"),
        code("loose", 3, "print(loss)", "nbval-ignore-output", printed="0.123\n"),
        code("claim", 4, 'check("it learns", loss < 1)', printed="✓ it learns\n"),
        code("answer", 5, "print(2)", "solution", printed="2\n", **tool.SOLUTION_METADATA),
        markdown("closing", closing),
    ]
    return {
        "cells": cells,
        "metadata": tool.NOTEBOOK_METADATA,
        "nbformat": 4,
        "nbformat_minor": 5,
    }


@pytest.fixture
def complaints(tmp_path):
    """A function that writes a notebook and returns what each rule says, by the rule's name."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in ("01_before", "03_after"):
        (folder / f"{name}.ipynb").touch()
    (tmp_path / "README.md").write_text(f"| [Good](notebooks/{NAME}.ipynb) |\n")

    def apply(notebook):
        path = folder / f"{NAME}.ipynb"
        path.write_text(json.dumps(notebook), encoding="utf-8")
        said = {rule.__name__: list(rule(Notebook(path))) for rule in RULES}
        return {name: lines for name, lines in said.items() if lines}

    return apply


def test_a_good_notebook_passes(complaints):
    assert complaints(good_notebook()) == {}


def adds(cell, text):
    """A fault: one more line in the source of a cell."""

    def plant(cells):
        cells[cell]["source"] += "\n" + text

    return plant


def replaces(cell, old, new=""):
    def plant(cells):
        assert old in cells[cell]["source"]
        cells[cell]["source"] = cells[cell]["source"].replace(old, new)

    return plant


def sets(cell, key, value):
    def plant(cells):
        cells[cell][key] = value

    return plant


def prints(cell, text, **changes):
    output = {"output_type": "stream", "name": "stdout", "text": text} | changes
    return lambda cells: cells[cell]["outputs"].append(output)


def shows(cell, mime, data):
    output = {"output_type": "display_data", "data": {mime: data}, "metadata": {}}
    return lambda cells: cells[cell]["outputs"].append(output)


def error(cells):
    failed = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
    cells["exact"]["outputs"] = [failed]


BIG = base64.b64encode(bytes(100_000)).decode()
HUGE = "a" * 1_000_000
IGNORED = {"tags": ["nbval-ignore-output"]}
FAULTS = {
    "no title": ("opening", replaces("opening", "# Good", "Good")),
    "code first": ("opening", sets("opening", "cell_type", "raw")),
    "no outcomes": ("opening", replaces("opening", "**You will**")),
    "no prerequisites": ("opening", replaces("opening", "**You need**")),
    "no run time": ("opening", replaces("opening", "**Run time**")),
    "another badge": ("opening", replaces("opening", tool.slug(), "another/fork")),
    "badge of another notebook": ("opening", replaces("opening", f"{NAME}.ipynb", "01.ipynb")),
    "no previous": ("neighbours", replaces("opening", "(01_before.ipynb)", "()")),
    "no next": ("neighbours", replaces("opening", "(03_after.ipynb)", "(01_before.ipynb)")),
    "no closing": ("closing", replaces("closing", "You have seen")),
    "edited set-up": ("setup", adds("setup", "import os")),
    "address in the text": ("address", adds("closing", f"https://github.com/{tool.slug()}")),
    "no solution": ("solutions", sets("answer", "metadata", {})),
    "open solution": ("solutions", sets("answer", "metadata", {"tags": ["solution"]})),
    "long cell": ("length", adds("exact", "x = 1\n" * 25)),
    "magic": ("plain_python", adds("exact", "%timeit x")),
    "shell": ("plain_python", adds("exact", "!ls")),
    "semicolon": ("plain_python", adds("exact", "plt.plot(x);")),
    "widget import": ("plain_python", adds("exact", "from tqdm.auto import tqdm")),
    "dead link": ("links", adds("closing", "[more](09_missing.ipynb#top)")),
    "dead picture": ("links", adds("closing", '<img src="missing.png">')),
    "typed number": ("numbers", adds("closing", "It costs 0.26 %.")),
    "number of a run": ("numbers", adds("closing", "The loss is 0.123.")),
    "counts": ("execution", sets("claim", "execution_count", 7)),
    "not run": ("execution", sets("claim", "execution_count", None)),
    "error": ("outputs", error),
    "stderr": ("outputs", prints("exact", "careful", name="stderr")),
    "widget": ("outputs", shows("exact", "application/vnd.jupyter.widget-view+json", {})),
    "progress bar": ("outputs", prints("exact", " 40%|####  | 4/10 [00:01<00:02]")),
    "memory address": ("outputs", prints("exact", "<object at 0x7f3c2a10>")),
    "path printed": ("machine_paths", prints("exact", "/home/me/lora/data")),
    "path in code": ("machine_paths", adds("exact", 'open("/tmp/x")')),
    "path in a result": ("machine_paths", shows("exact", "text/plain", ["'/Users/me'", "/Users/"])),
    "big picture": ("sizes", shows("exact", "image/png", BIG)),
    "big notebook": ("sizes", prints("exact", HUGE)),
    "little compared": (
        "compared",
        lambda cells: [cells[name].update(metadata=IGNORED) for name in ("exact", "claim")],
    ),
    "skip": ("nothing_skipped", sets("exact", "metadata", {"tags": ["nbval-skip"]})),
    "may raise": ("nothing_skipped", sets("exact", "metadata", {"tags": ["raises-exception"]})),
    "skip in a comment": ("nothing_skipped", adds("exact", "# NBVAL_SKIP")),
    "unchecked": ("ignored_cells_check", replaces("claim", "check(", "print(")),
    "timing": ("metadata", sets("exact", "metadata", {"execution": {"iopub.status.idle": "…"}})),
    "collapsed by hand": ("metadata", sets("exact", "metadata", {"collapsed": True})),
}


@pytest.mark.parametrize("rule, plant", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_reported(complaints, rule, plant):
    notebook = good_notebook()
    plant({cell["id"]: cell for cell in notebook["cells"]})
    assert rule in complaints(notebook)


FILE_FAULTS = {
    "kernel": {"metadata": {**tool.NOTEBOOK_METADATA, "kernelspec": {"name": "my-env"}}},
    "language": {"metadata": {"kernelspec": tool.NOTEBOOK_METADATA["kernelspec"]}},
    "stray": {"metadata": {**tool.NOTEBOOK_METADATA, "widgets": {}}},
    "format": {"nbformat_minor": 4},
}


@pytest.mark.parametrize("change", FILE_FAULTS.values(), ids=FILE_FAULTS)
def test_a_fault_of_the_file_is_reported(complaints, change):
    assert "metadata" in complaints(good_notebook() | change)


def test_a_missing_or_late_setup_is_reported(complaints):
    notebook = good_notebook()
    cells = notebook["cells"]
    cells[1], cells[2] = cells[2], cells[1]
    assert "setup" in complaints(notebook)
    del cells[2]
    assert "setup" in complaints(notebook)


def test_a_notebook_outside_the_table_is_reported(complaints, tmp_path):
    (tmp_path / "README.md").write_text(f"See [Good](notebooks/{NAME}.ipynb).\n")
    assert "readme" in complaints(good_notebook())


def test_each_rule_has_a_fault():
    tested = {rule for rule, _ in FAULTS.values()} | {"setup", "metadata", "readme"}
    assert tested == {rule.__name__ for rule in RULES}
