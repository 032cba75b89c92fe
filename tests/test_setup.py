"""The set-up cell in Jupyter and in Colab, and what executes the notebooks."""

import json
import os
import re
import subprocess
import sys

import pytest

import execute as tool
from conventions import REPOSITORY, ROOT

FIRST = json.loads(min(tool.NOTEBOOKS.glob("*.ipynb")).read_text(encoding="utf-8"))
[SETUP] = ["".join(cell["source"]) for cell in FIRST["cells"] if cell["id"] == "setup"]

# Without what git tells its children: the tests start their own git.
ENV = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
ENV["GIT_CONFIG_GLOBAL"] = os.devnull


def run(folder, *command, **env):
    """Return the status of a command, and what it printed."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    result = subprocess.run(command, cwd=folder, env=ENV | env, timeout=120, **both)
    return result.returncode, result.stdout.strip()


# The set-up cell

IN_COLAB = 'import sys, types\nsys.modules["google.colab"] = types.ModuleType("google.colab")\n'
FIND_MODULE = '\nfrom importlib.util import find_spec\nprint(find_spec("lora_utils").origin)'


def run_setup_cell(folder, before="", fetch_from="file:///nowhere"):
    """Run it and return where it finds the module; git fetches from another address."""
    address = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{fetch_from}.insteadOf",
        "GIT_CONFIG_VALUE_0": f"https://github.com/{REPOSITORY}",
    }
    status, printed = run(folder, sys.executable, "-c", before + SETUP + FIND_MODULE, **address)
    return (folder / printed.splitlines()[-1]).resolve() if status == 0 else None


def test_colab_clones_once(tmp_path):
    origin, here = tmp_path / "origin", tmp_path / "content"
    origin.mkdir()
    here.mkdir()
    (origin / "lora_utils.py").touch()
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "The module"]):
        assert run(origin, "git", *command) == (0, "")
    assert run_setup_cell(here, IN_COLAB) is None and not any(here.iterdir())
    found = here / "lora-notebooks" / "lora_utils.py"
    assert run_setup_cell(here, IN_COLAB, origin.as_uri()) == found
    assert run_setup_cell(here, IN_COLAB) == found


@pytest.mark.parametrize("folder", [".", "notebooks", "notebooks/deeper"])
def test_elsewhere_it_finds_the_module(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "lora_utils.py").touch()
    assert run_setup_cell(tmp_path / folder) == tmp_path / "lora_utils.py"


# run, refresh and seeds


@pytest.mark.parametrize("said, seconds", [("4 minutes", 240), ("45 s", 45), ("a while", 0)])
def test_the_run_time_that_a_notebook_says(tmp_path, said, seconds):
    (tmp_path / "a.ipynb").write_text(f"**Reading time** 9 minutes · **Run time** {said} on a CPU")
    assert tool.run_time(tmp_path / "a.ipynb") == seconds


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A function that adds a notebook of these code cells to an empty project."""
    monkeypatch.setattr(tool, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(tool, "BUILD", tmp_path / "build")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def add(name, *sources, **metadata):
        cells = [
            {"cell_type": "code", "id": f"cell-{i}", "metadata": metadata, "source": source}
            | {"execution_count": 7, "outputs": []}
            for i, source in enumerate(sources)
        ]
        cells[0]["id"] = "imports"
        notebook = {"cells": cells, "metadata": {"colab": {}}, "nbformat": 4, "nbformat_minor": 5}
        path = tmp_path / f"notebooks/{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(notebook), encoding="utf-8")
        return path

    return add


NOISY = """\
import sys
print("one", flush=True)
print("careful", file=sys.stderr, flush=True)
print("two")"""


def test_refresh_cleans_repeats_and_leaves_a_failing_notebook_alone(project):
    path = project("01_good", NOISY, "6 * 7", tags=["solution"], collapsed=True, execution={})
    deeper = project("deeper/01_more", "print(1)")
    bad = project("02_bad", "print(1)", "1 / 0")
    before = bad.read_bytes()
    assert tool.main(["refresh"]) == 1
    assert bad.read_bytes() == before
    assert json.loads(deeper.read_bytes())["cells"][0]["execution_count"] == 1
    text = path.read_bytes()
    notebook = json.loads(text)
    noisy, solution = notebook["cells"]
    assert notebook["metadata"] == tool.NOTEBOOK_METADATA
    assert solution["metadata"] == {"tags": ["solution"], **tool.folding(["solution"])}
    [stream], [result] = noisy["outputs"], solution["outputs"]
    assert stream["name"] == "stdout" and stream["text"] == ["one\n", "two\n"]
    assert result["data"] == {"text/plain": ["42"]}
    assert tool.main(["refresh", "01_good"]) == 0
    assert path.read_bytes() == text


def test_run_goes_on_after_a_failure(project, tmp_path, capsys):
    project("01_bad", "print(1)", "1 / 0", "print(2)")
    good = project("02_good", "print(1)")
    project("deeper/02_more", "print(1)")
    before = good.read_bytes()
    assert tool.main(["run"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^01_bad  FAILED\n(.*\n)*ZeroDivisionError", printed, re.MULTILINE)
    assert re.search(r"^02_good  [\d.]+ s$", printed, re.MULTILINE)
    bad = json.loads((tmp_path / "build/01_bad.ipynb").read_text(encoding="utf-8"))
    assert [len(cell["outputs"]) for cell in bad["cells"]] == [1, 1, 0]
    assert good.read_bytes() == before
    assert not (tmp_path / "build/deeper").exists()
    assert tool.main(["run", "--deeper", "02_good", "deeper/02_more.ipynb"]) == 0
    assert (tmp_path / "build/deeper/02_more.ipynb").exists()


SEEDED = """\
import sys
from lora_show import check
from lora_tasks import pretrained_richboynet

SEED = 0"""
CLAIMS = """\
check("always", True)
check("the seed is as declared", SEED == 0)
check("one seed of two", SEED != 1000)
check("the base of one seed", pretrained_richboynet.__module__ == "lora_tasks")"""


def test_seeds_reports_all_claims_that_fail(project, capsys):
    project("deeper/01_seeded", SEEDED, CLAIMS, "1 / 0")
    assert tool.main(["seeds", "--shifts", "2"]) == 1
    table = capsys.readouterr().out.partition("claims failed")[2]
    for claim in ("the seed is as declared", "the base of one seed", "stopped: ZeroDivision"):
        assert re.search(f"2 of 2  01_seeded: {claim}", table)
    assert re.search(r"1 of 2 .*one seed of two \(1000\)", table)
    assert "always" not in table


def test_seeds_wants_a_declared_seed(project, capsys):
    project("01_unseeded", "SEED = 1")
    assert tool.main(["seeds", "--shifts", "1"]) == 1
    assert "has no line SEED = 0" in capsys.readouterr().out
