"""Each convention can fail: a fault is planted in a good notebook, and its rule reports it."""

import json

import pytest

from conventions import (
    COLAB,
    NOTEBOOK_METADATA,
    REPOSITORY,
    RULES,
    Notebook,
    claims,
    folding,
    reading,
)

BADGE = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/{REPOSITORY}/blob/main"
OPENING = f"""\
# Good
{BADGE}/notebooks/02_good.ipynb)
**After this you know that** it works. **You need** little. **Reading time** 1 minute
**Run time** short. [before](01_before.ipynb) [after](03_after.ipynb) [more](deeper/02_more.ipynb)
"""
DEEPER = (
    f"# More\n{BADGE}/notebooks/deeper/02_more.ipynb)\n[2](../02_good.ipynb) **Run time** short"
)
CLOSING = """\
## You have seen
0.25, $0.7$, `0.8`, [1.5](https://a.b/2.5), §4.1, Sections 7.2 and 7.3
**On Monday** try it."""
FIGURE = [{"data": {"image/png": "iVBO"}, "metadata": {"image/png": {"alt": "a curve"}}}]


def cell(kind, name, text, *tags, printed=""):
    metadata = {"tags": [*tags]} | folding(tags) if tags else {}
    made = {"cell_type": kind, "id": name, "metadata": metadata, "source": text}
    if kind == "code":
        made["outputs"] = [{"output_type": "stream", "text": printed}] if printed else []
    return made


def good_notebook(opening=OPENING):
    cells = [
        cell("markdown", "opening", opening),
        cell("code", "setup", "import sys"),
        cell("code", "imports", "import torch\n\nSEED = 0"),
        cell("code", "exact", "print(1 / 4)", "nbval-check-output", printed="0.25\n"),
        cell("code", "define", "def draw(k):\n    show_figure('a curve')"),
        cell("code", "figure", "for k in range(2):\n    draw(k)", "folded", "answer"),
        cell("markdown", "closing", CLOSING),
        cell("markdown", "exercises", "## Exercises"),
        cell("code", "answer", "print(2)", "solution", printed="2\n"),
        cell("code", "promises", "check('it learns', loss < 1)", "promises", printed="✓ it learns"),
    ]
    cells[5]["outputs"] = json.loads(json.dumps(FIGURE))
    return {"cells": cells, "metadata": NOTEBOOK_METADATA, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def complaints(tmp_path):
    """A function that writes a notebook and returns the names of the rules that complain."""
    folder = tmp_path / "notebooks"
    (folder / "deeper").mkdir(parents=True)
    for name in ("01_before", "03_after", "02_good", "deeper/02_more"):
        (folder / f"{name}.ipynb").write_text(json.dumps(good_notebook()), encoding="utf-8")
    (tmp_path / "README.md").write_text("| [Good](notebooks/02_good.ipynb) | 1 | |\n")
    (tmp_path / "lora_show.py").write_text("def show_images():\n    show_figure('digits')\n")

    def apply(notebook, name="02_good"):
        path = folder / f"{name}.ipynb"
        path.write_text(json.dumps(notebook), encoding="utf-8")
        return {rule.__name__ for rule in RULES if list(rule(Notebook(path)))}

    return apply


def test_good_notebooks_pass(complaints):
    assert complaints(good_notebook()) == set()
    assert complaints(good_notebook(DEEPER), "deeper/02_more") == set()


def edit(name, old="", new=""):
    """A fault: `old` becomes `new` in a cell's source; without `old`, `new` is added."""

    def plant(cells):
        source = cells[name]["source"]
        assert old in source
        cells[name]["source"] = source.replace(old, new) if old else f"{source}\n{new}"

    return plant


def put(name, **values):
    return lambda cells: cells[name].update(values)


FAULTS = [
    ("opening", edit("opening", "# Good", "Good")),
    ("opening", edit("opening", "**After this you know that**")),
    ("opening", edit("opening", "**You need**")),
    ("opening", edit("opening", "**Reading time**")),
    ("opening", edit("opening", "**Run time**")),
    (
        "opening",
        edit("opening", "**You need** little. **Reading time**", "**Reading time** **You need**"),
    ),
    ("opening", edit("opening", REPOSITORY, "another/fork")),
    ("opening", edit("opening", "main/notebooks/02_good", "main/notebooks/02")),
    ("neighbours", edit("opening", "(01_before.ipynb)", "()")),
    ("neighbours", edit("opening", "(03_after.ipynb)", "()")),
    ("neighbours", edit("opening", "(deeper/02_more.ipynb)", "()")),
    ("closing", edit("closing", "You have seen")),
    ("closing", edit("closing", "On Monday")),
    ("setup", edit("setup", new="import os")),
    ("setup", put("setup", id="set-up")),
    ("seeded", edit("imports", "SEED = 0", "SEED = 1")),
    ("seeded", edit("exact", new="SEED = 0")),
    ("seeded", edit("exact", new="torch.manual_seed(1)")),
    ("promises", edit("promises", "check", "print")),
    ("promises", put("promises", metadata={})),
    ("closing", put("answer", metadata={})),
    ("links", edit("closing", new="[more](09_missing.ipynb#top)")),
    ("links", edit("closing", new='<img src="missing.png">')),
    ("numbers", edit("closing", new="It costs 0.26 %.")),
    ("figures", put("figure", outputs=[])),
    ("figures", edit("exact", new="show_images()")),
    ("figures", put("figure", outputs=[FIGURE[0] | {"metadata": {}}])),
    ("machine_paths", edit("exact", new='open("/tmp/x")')),
    ("machine_paths", put("exact", outputs=[{"data": {"text/plain": ["'/Users/me'"]}}])),
    ("minutes", edit("opening", "1 minute", "7 minutes")),
    ("readme", edit("opening", "1 minute", "2 minutes")),
    ("metadata", put("answer", metadata={"tags": ["solution"]})),
    ("metadata", put("exact", metadata={"collapsed": True})),
    ("metadata", put("exact", metadata={"tags": ["nbval-skip"]})),
]


@pytest.mark.parametrize("rule, plant", FAULTS)
def test_a_planted_fault_is_reported(complaints, rule, plant):
    notebook = good_notebook()
    plant({cell["id"]: cell for cell in notebook["cells"]})
    assert rule in complaints(notebook)


def test_other_faults_are_reported(complaints, tmp_path):
    lost = good_notebook(DEEPER.replace("../02_good", "02_good"))
    assert complaints(lost, "deeper/02_more") == {"neighbours", "links"}
    assert "metadata" in complaints(good_notebook() | {"metadata": {"kernelspec": {"name": "my"}}})
    (tmp_path / "README.md").write_text("See [Good](notebooks/02_good.ipynb).\n")
    assert complaints(good_notebook()) == {"readme"}


def test_each_rule_has_a_fault():
    assert {rule for rule, _ in FAULTS} == {rule.__name__ for rule in RULES}


def test_what_is_folded_takes_no_time(tmp_path):
    (tmp_path / "02_good.ipynb").write_text(json.dumps(good_notebook()), encoding="utf-8")
    counts = reading(Notebook(tmp_path / "02_good.ipynb"))
    assert [counts[name] for name in ("cells", "code", "figures", "ticks")] == [5, 3, 1, 0]


CLAIM = """Intro.

## "It works."

**Yes.** A quarter, 0.25.

*Scope: one.*

![](02_good.ipynb#figure)
"""


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("", "", None),
        ("0.25", "0.26", "0.26"),
        ("0.25", "25 %", "25%"),
        ("0.25", "4", "the number 4"),  # it stands in the code alone
        ("Intro", "Intro 7", "before the first claim"),
        ("#figure", "#exact", "no figure in a cell exact"),
        ("02_good", "02_gone", "not one figure"),
        ("![](02_good.ipynb#figure)\n", "", "not one figure"),
        ("**Yes.**", "Yes.", "verdict"),
        ("Yes.", "Yes, and here is a great deal more.", "verdict"),
        ("*Scope: one.*", "", "scope"),
    ],
)
def test_a_claim_holds_what_its_notebook_holds(tmp_path, old, new, fault):
    (tmp_path / "02_good.ipynb").write_text(json.dumps(good_notebook()), encoding="utf-8")
    found = list(claims(CLAIM.replace(old, new) if old else CLAIM, tmp_path))
    assert len(found) == bool(fault) and (not fault or fault in found[0])
