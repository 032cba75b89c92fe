"""The set-up cell in Jupyter and Colab, the tools' commands, and the Makefile's set-up."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import notebooks as tool
import stamp

# Without what git and make tell their children: the tests start their own git and make.
MAKE = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "PYTHON", "REPOSITORY", "NAMES")
ENV = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") and k not in MAKE}
ENV["GIT_CONFIG_GLOBAL"] = os.devnull


def run(folder, *command, **env):
    """Return the status of a command, and what it printed."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    result = subprocess.run(command, cwd=folder, env=ENV | env, timeout=120, **both)
    return result.returncode, result.stdout.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project's own files, in a git repository."""
    copy = tmp_path_factory.mktemp("copy") / "tree"
    generated = shutil.ignore_patterns(".git", ".venv*", "build", "*cache*", "*ubyte")
    shutil.copytree(tool.ROOT, copy, ignore=generated)
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "All files"]):
        assert run(copy, "git", *command) == (0, "")
    return copy


# The set-up cell

IN_COLAB = 'import sys, types\nsys.modules["google.colab"] = types.ModuleType("google.colab")\n'
FIND_MODULE = '\nfrom importlib.util import find_spec\nprint(find_spec("lora_utils").origin)'


def run_setup_cell(folder, before="", fetch_from="file:///nowhere"):
    """Run it and say where it finds the module; git fetches from another address."""
    address = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{fetch_from}.insteadOf",
        "GIT_CONFIG_VALUE_0": stamp.REPOSITORY,
    }
    return run(folder, sys.executable, "-c", before + stamp.setup_cell() + FIND_MODULE, **address)


def test_colab_clones_once(tmp_path, tree):
    _, printed = run_setup_cell(tmp_path, IN_COLAB, tree.as_uri())
    clone = tmp_path / "lora-notebooks"
    assert (tmp_path / printed.splitlines()[-1]).resolve() == clone / "lora_utils.py"
    assert len(list(clone.glob("data/MNIST/raw/*.gz"))) == 4
    assert run_setup_cell(tmp_path, IN_COLAB)[0] == 0


def test_colab_stops_when_the_clone_fails(tmp_path):
    status, _ = run_setup_cell(tmp_path, IN_COLAB)
    assert status != 0 and not any(tmp_path.iterdir())


def test_elsewhere_the_module_is_one_folder_up(tree):
    _, printed = run_setup_cell(tree / "notebooks")
    assert (tree / "notebooks" / printed).resolve() == tree / "lora_utils.py"


# stamp


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path: path.read_bytes() for path in files if not {".git", "__pycache__"} & {*path.parts}
    }


def test_stamp_moves_to_another_address_and_back(tree):
    def stamped(*address):
        assert run(tree, sys.executable, "tools/stamp.py", *address) == (0, "")
        return contents(tree)

    before = contents(tree)
    run(tree, "git", "remote", "add", "origin", "git@github.com:somebody/another.name.git")
    after = stamped()
    run(tree, "git", "remote", "remove", "origin")
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {tree / name for name in stamp.TEXTS} | {*tree.glob("notebooks/*.ipynb")}
    assert not [path for path, text in after.items() if stamp.slug().encode() in text]
    assert stamped("https://github.com/somebody/another.name") == after
    assert stamped(stamp.REPOSITORY) == before


@pytest.mark.parametrize("address", [[], ["https://example.com/a/b"], ["somebody/lora"]])
def test_stamp_refuses_other_addresses(tree, address):
    before = contents(tree)
    status, printed = run(tree, sys.executable, "tools/stamp.py", *address)
    assert status != 0 and "https://github.com/OWNER/NAME" in printed
    assert contents(tree) == before


# run, refresh and seeds


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A function that adds a notebook of these code cells to an empty project."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(tool, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(tool, "BUILD", tmp_path / "build")

    def add(name, *sources, **metadata):
        cells = [
            {"cell_type": "code", "id": f"cell-{i}", "metadata": metadata, "source": source}
            | {"execution_count": 7, "outputs": []}
            for i, source in enumerate(sources)
        ]
        notebook = {"cells": cells, "metadata": {"colab": {}}, "nbformat": 4, "nbformat_minor": 5}
        path = tmp_path / f"notebooks/{name}.ipynb"
        path.write_text(json.dumps(notebook), encoding="utf-8")
        return path

    return add


NOISY = 'import sys\nprint("one")\nprint("careful", file=sys.stderr, flush=True)\nprint("two")'
FIGURE = 'display({"image/png": ""}, raw=True, metadata={"image/png": {"alt": "a figure"}})'
FOLDED = {"tags": ["solution"], **tool.folding(["solution"])}


def test_refresh_cleans_repeats_and_leaves_a_failing_notebook_alone(project):
    path = project("01_good", NOISY, "6 * 7", tags=["solution"], collapsed=True, execution={})
    bad = project("02_bad", "print(1)", "1 / 0")
    before = bad.read_bytes()
    assert tool.main(["refresh"]) == 1
    assert {file: file.read_bytes() for file in path.parent.iterdir() if file != path} == {
        bad: before
    }
    text = path.read_bytes()
    notebook = json.loads(text)
    noisy, solution = notebook["cells"]
    assert notebook["metadata"] == tool.NOTEBOOK_METADATA and solution["metadata"] == FOLDED
    [stream], [result] = noisy["outputs"], solution["outputs"]
    assert stream["name"] == "stdout" and stream["text"] == ["one\n", "two\n"]
    assert result["data"] == {"text/plain": ["42"]}
    assert tool.main(["refresh", "01_good"]) == 0
    assert path.read_bytes() == text


def test_run_goes_on_after_a_failure(project, tmp_path, capsys):
    project("01_bad", "print(1)", "1 / 0", "print(2)")
    good = project("02_good", FIGURE, **FOLDED)
    before = good.read_bytes()
    assert tool.main(["run"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^01_bad  FAILED\n(.*\n)*ZeroDivisionError", printed, re.MULTILINE)
    assert re.search(r"^02_good  [\d.]+ s$", printed, re.MULTILINE)
    bad = json.loads((tmp_path / "build/01_bad.ipynb").read_text(encoding="utf-8"))
    assert [len(cell["outputs"]) for cell in bad["cells"]] == [1, 1, 0]
    page = (tmp_path / "build/02_good.html").read_text(encoding="utf-8")
    assert ">Solution</summary>" in page and 'alt="a figure"' in page
    assert good.read_bytes() == before


SEEDED = f"""\
import numpy as np
import torch
import lora_tasks
import lora_utils
from lora_show import check
from lora_utils import draw
check("always", True)
check("a seed of torch", torch.manual_seed(1).initial_seed() == 1)
check("a generator's seed", torch.Generator().manual_seed(2).initial_seed() == 2)
check("a seed of numpy", np.random.default_rng(3).random() == {np.random.default_rng(3).random()})
check("the module's seed", draw() == 4)
check("the base of one seed", lora_tasks.pretrained_richboynet.__module__ == "lora_utils")
check("one shift of two", torch.initial_seed() != 1004)"""


def test_seeds_reports_all_claims_that_fail(project, tmp_path, capsys):
    module = (tool.ROOT / "lora_utils.py").read_text(encoding="utf-8")
    module += "\n\ndef draw(seed=4):\n    return torch.manual_seed(seed).initial_seed()\n"
    (tmp_path / "lora_utils.py").write_text(module, encoding="utf-8")
    project("01_seeded", SEEDED, "1 / 0")
    assert tool.main(["seeds", "--shifts", "2"]) == 1
    table = capsys.readouterr().out.partition("claims failed")[2]
    claims = ("a seed of torch", "a generator's seed", "a seed of numpy", "the module's seed")
    for claim in (*claims, "the base of one seed", "ZeroDivision"):
        assert re.search(f"2 of 2 .*{claim}", table)
    assert re.search(r"1 of 2 .*one shift of two \(1000\)", table)
    assert "always" not in table


# The Makefile's set-up, with a stand-in for Python that notes what it is asked to do

FAKE_PYTHON = """\
#!/bin/sh
echo "$@" >> log
case "$*" in
  "-m venv .venv")  # with the folder of Windows, too
    for bin in bin Scripts; do mkdir -p .venv/$bin && cp "$0" .venv/$bin/python; done ;;
  "-m uv pip"*) exit ${UV_STATUS:-0} ;;
  "-m pip install -r"*) exit ${PIP_STATUS:-0} ;;
esac
"""


def test_the_set_up(tmp_path):
    """Once, with uv, else with pip; again after a failure and when the requirements change."""

    def make(**env):
        (tmp_path / "log").write_text("")
        status, _ = run(tmp_path, "make", "refresh", "PYTHON=./python", **env)
        log = (tmp_path / "log").read_text()
        return status == 0, re.findall(r"-m (uv|pip) .*-r requirements.txt", log)

    shutil.copy(tool.ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    assert make(UV_STATUS="1", PIP_STATUS="1") == (False, ["uv", "pip"])
    assert make(UV_STATUS="1") == (True, ["uv", "pip"])
    assert make() == (True, [])
    later = (tmp_path / ".venv/ready").stat().st_mtime + 10
    os.utime(tmp_path / "requirements.txt", (later, later))
    assert make() == (True, ["uv"])


def test_an_old_python_is_named(tmp_path):
    old = "import sys; sys.version_info = (3, 9, 1); sys.version = '3.9.1 old'; exec(sys.argv[1])"
    shutil.copy(tool.ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "python").write_text(f'#!/bin/sh\n"{sys.executable}" -c "{old}" "$2"\n')
    (tmp_path / "python").chmod(0o755)
    status, printed = run(tmp_path, "make", "run", "PYTHON=./python")
    assert status != 0 and "this is 3.9.1" in printed
    assert not (tmp_path / ".venv").exists()
