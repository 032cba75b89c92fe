"""Each convention can fail: a fault is planted in a good notebook, and its rule reports it."""

import base64
import json

import pytest

import stamp
from conventions import NOTEBOOK_METADATA, RULES, Notebook, folding

NAME = "02_good"
OPENING = (
    f"# Good\n{stamp.badge(NAME)}\n**You will** see. **You need** little. **Run time** short.\n"
    "[before](01_before.ipynb) [after](03_after.ipynb)"
)
CLOSING = "## You have seen\n0.25, $0.7$, `0.8`, [1.5](https://a.b/2.5), §4.1, Sections 7.2 and 7.3"


def cell(kind, name, text, count=None, printed="", **metadata):
    made = {"cell_type": kind, "id": name, "metadata": metadata, "source": text}
    if kind == "code":
        outputs = [{"output_type": "stream", "name": "stdout", "text": printed}] if printed else []
        made |= {"execution_count": count, "outputs": outputs}
    return made


def good_notebook():
    cells = [
        cell("markdown", "opening", OPENING),
        cell("code", "setup", stamp.setup_cell(), 1),
        cell("code", "exact", "print(1 / 4)", 2, "0.25\n"),
        cell("markdown", "section", "## Does it learn?"),
        cell("code", "claim", 'check("it learns", loss < 1)', 3, "✓ it learns\n"),
        cell("code", "loose", "print(loss)", 4, "0.123\n", tags=["nbval-ignore-output"]),
        cell("markdown", "closing", CLOSING),
        cell("code", "answer", "print(2)", 5, "2\n", tags=["solution"], **folding(["solution"])),
    ]
    return {"cells": cells, "metadata": NOTEBOOK_METADATA, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def complaints(tmp_path):
    """A function that writes a notebook and returns the names of the rules that complain."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in ("01_before", "03_after"):
        (folder / f"{name}.ipynb").touch()
    (tmp_path / "README.md").write_text(f"| [Good](notebooks/{NAME}.ipynb) |\n")

    def apply(notebook):
        path = folder / f"{NAME}.ipynb"
        path.write_text(json.dumps(notebook), encoding="utf-8")
        return {rule.__name__ for rule in RULES if list(rule(Notebook(path)))}

    return apply


def test_a_good_notebook_passes(complaints):
    assert complaints(good_notebook()) == set()


def edit(name, old="", new=""):
    """A fault: `old` becomes `new` in a cell's source; without `old`, `new` is added."""

    def plant(cells):
        source = cells[name]["source"]
        assert old in source
        cells[name]["source"] = source.replace(old, new) if old else f"{source}\n{new}"

    return plant


def put(name, **values):
    return lambda cells: cells[name].update(values)


def out(**output):
    """A fault: one more output of the cell `exact`."""
    output = {"output_type": "stream", "name": "stdout", "text": ""} | output
    return lambda cells: cells["exact"]["outputs"].append(output)


def shown(mime, data):
    return out(output_type="display_data", data={mime: data}, metadata={})


IGNORED = {"metadata": {"tags": ["nbval-ignore-output"]}}
FAULTS = [
    ("opening", edit("opening", "# Good", "Good")),
    ("opening", put("opening", cell_type="raw")),
    ("opening", edit("opening", "**You will**")),
    ("opening", edit("opening", "**You need**")),
    ("opening", edit("opening", "**Run time**")),
    ("opening", edit("opening", stamp.slug(), "another/fork")),
    ("opening", edit("opening", f"{NAME}.ipynb", "01.ipynb")),
    ("neighbours", edit("opening", "(01_before.ipynb)", "()")),
    ("neighbours", edit("opening", "(03_after.ipynb)", "()")),
    ("closing", edit("closing", "You have seen")),
    ("setup", edit("setup", "os.environ", "# os.environ")),
    ("setup", put("setup", cell_type="raw")),
    ("address", edit("closing", new=f"https://github.com/{stamp.slug()}")),
    ("solutions", put("answer", metadata={})),
    ("metadata", put("answer", metadata={"tags": ["solution"]})),
    ("metadata", put("exact", metadata={"collapsed": True})),
    ("metadata", put("exact", metadata={"tags": ["answer"]})),
    ("alt_text", shown("image/png", "")),
    ("length", edit("exact", new="x = 1\n" * 26)),
    ("plain_python", edit("exact", new="%timeit x")),
    ("plain_python", edit("exact", new="plt.plot(x);")),
    ("plain_python", edit("exact", new="from tqdm.auto import tqdm")),
    ("links", edit("closing", new="[more](09_missing.ipynb#top)")),
    ("links", edit("closing", new='<img src="missing.png">')),
    ("numbers", edit("closing", new="It costs 0.26 %.")),
    ("numbers", edit("closing", new="The loss is 0.123.")),
    ("execution", put("claim", execution_count=7)),
    ("execution", put("claim", execution_count=None)),
    ("outputs", out(output_type="error", ename="E", evalue="", traceback=[])),
    ("outputs", out(name="stderr", text="careful")),
    ("outputs", out(text=" 40%|####  | 4/10 [00:01<00:02]")),
    ("outputs", out(text="<object at 0x7f3c2a10>")),
    ("outputs", shown("application/vnd.jupyter.widget-view+json", {})),
    ("machine_paths", out(text="/home/me/lora/data")),
    ("machine_paths", edit("exact", new='open("/tmp/x")')),
    ("machine_paths", shown("text/plain", ["'/Users/me'"])),
    ("sizes", shown("image/png", base64.b64encode(bytes(100_000)).decode())),
    ("sizes", out(text="a" * 1_000_000)),
    ("compared", lambda cells: [put(n, **IGNORED)(cells) for n in ("setup", "exact")]),
    ("nothing_skipped", put("exact", metadata={"tags": ["nbval-skip"]})),
    ("nothing_skipped", put("exact", metadata={"tags": ["raises-exception"]})),
    ("nothing_skipped", edit("exact", new="# NBVAL_SKIP")),
    ("checked", edit("claim", "check(", "print(")),
    ("checked", put("exact", **IGNORED)),
]


@pytest.mark.parametrize("rule, plant", FAULTS)
def test_a_planted_fault_is_reported(complaints, rule, plant):
    notebook = good_notebook()
    plant({cell["id"]: cell for cell in notebook["cells"]})
    assert rule in complaints(notebook)


def test_faults_of_the_file_are_reported(complaints, tmp_path):
    assert "metadata" in complaints(good_notebook() | {"metadata": {"kernelspec": {"name": "my"}}})
    assert "metadata" in complaints(good_notebook() | {"nbformat_minor": 4})
    (tmp_path / "README.md").write_text(f"See [Good](notebooks/{NAME}.ipynb).\n")
    assert complaints(good_notebook()) == {"readme"}


def test_each_rule_has_a_fault():
    assert {rule for rule, _ in FAULTS} | {"readme"} == {rule.__name__ for rule in RULES}
