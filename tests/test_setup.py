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
CLEAN_ENV = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") and k not in MAKE}


def run(command, folder, **env):
    env = CLEAN_ENV | {"GIT_CONFIG_GLOBAL": os.devnull} | env
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, encoding="utf-8"
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project's own files, with a git repository around it."""
    copy = tmp_path_factory.mktemp("copy") / "tree"
    generated = shutil.ignore_patterns(".git", ".venv", "build", "*_cache", "__pycache__", "*ubyte")
    shutil.copytree(tool.ROOT, copy, ignore=generated)
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "All files"]):
        result = run(["git", *command], copy)
        assert result.returncode == 0, result.stderr
    return copy


# The set-up cell

IN_COLAB = """
import types
sys.modules["google.colab"] = types.ModuleType("google.colab")
"""
FIND_MODULE = """
import importlib.util
print(Path(importlib.util.find_spec("lora_utils").origin).resolve())
"""


def run_setup_cell(folder, before="", **env):
    code = "import sys\n" + before + stamp.setup_cell() + "\n" + FIND_MODULE
    return run([sys.executable, "-c", code], folder, **env)


def fetch_from(address):
    """Environment variables that make git fetch the repository from another address."""
    key = f"url.{address}.insteadOf"
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": key,
        "GIT_CONFIG_VALUE_0": stamp.REPOSITORY,
    }


def test_colab_clones_once(tmp_path, tree):
    module = tmp_path / "lora-notebooks/lora_utils.py"
    first = run_setup_cell(tmp_path, IN_COLAB, **fetch_from(tree.as_uri()))
    assert first.stdout.strip() == str(module), first.stderr
    assert len(list(tmp_path.glob("lora-notebooks/data/MNIST/raw/*.gz"))) == 4
    again = run_setup_cell(tmp_path, IN_COLAB, GIT_ALLOW_PROTOCOL="none")
    assert again.stdout.strip() == str(module), again.stderr


def test_colab_stops_when_the_clone_fails(tmp_path):
    result = run_setup_cell(tmp_path, IN_COLAB, **fetch_from(tmp_path.as_uri() + "/missing"))
    assert result.returncode != 0 and "git" in result.stderr
    assert not (tmp_path / "lora-notebooks").exists()


def test_elsewhere_the_module_is_one_folder_up(tree):
    result = run_setup_cell(tree / "notebooks", GIT_ALLOW_PROTOCOL="none")
    assert result.stdout.strip() == str(tree / "lora_utils.py"), result.stderr
    assert not (tree / "notebooks/lora-notebooks").exists()


# stamp


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path: path.read_bytes() for path in files if not {".git", "__pycache__"} & {*path.parts}
    }


def test_stamp_moves_to_another_address_and_back(tree):
    def stamped(*address):
        result = run([sys.executable, "tools/stamp.py", *address], tree)
        assert result.returncode == 0, result.stderr
        return contents(tree)

    before = contents(tree)
    run(["git", "remote", "add", "origin", "git@github.com:somebody/another.name.git"], tree)
    after = stamped()
    run(["git", "remote", "remove", "origin"], tree)
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {tree / name for name in stamp.TEXTS} | {*tree.glob("notebooks/*.ipynb")}
    assert not [path for path, text in after.items() if stamp.slug().encode() in text]
    assert stamped("https://github.com/somebody/another.name") == after
    assert stamped(stamp.REPOSITORY) == before


@pytest.mark.parametrize("address", [[], ["https://example.com/a/b"], ["somebody/lora"]])
def test_stamp_refuses_other_addresses(tree, address):
    before = contents(tree)
    result = run([sys.executable, "tools/stamp.py", *address], tree)
    assert result.returncode != 0 and "https://github.com/OWNER/NAME" in result.stderr
    assert contents(tree) == before


# run, refresh and seeds


def code(source, **more):
    cell = {"cell_type": "code", "id": re.sub(r"\W+", "-", source)[:30], "metadata": {}}
    return cell | {"source": source, "execution_count": 7, "outputs": []} | more


def markdown(source):
    return {"cell_type": "markdown", "id": "text", "metadata": {}, "source": source}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project without notebooks, and a function that adds one to it."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(tool, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(tool, "BUILD", tmp_path / "build")

    def add(name, *cells):
        metadata = {"kernelspec": {"name": "mine", "display_name": "Mine"}, "colab": {}}
        notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
        path = tmp_path / f"notebooks/{name}.ipynb"
        path.write_text(json.dumps(notebook), encoding="utf-8")
        return path

    return add


NOISY = 'import sys\nprint("one")\nprint("careful", file=sys.stderr, flush=True)\nprint("two")'
EDITED = {"execution": {"iopub.status.idle": "now"}, "collapsed": True, "tags": ["solution"]}


def test_refresh_cleans_and_repeats(project):
    path = project("01_tiny", code(NOISY), code("6 * 7", metadata=EDITED))
    assert tool.main(["refresh"]) == 0
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    noisy, solution = notebook["cells"]
    assert notebook["metadata"] == tool.NOTEBOOK_METADATA
    assert noisy["outputs"] == [
        {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]}
    ]
    assert solution["metadata"] == {"tags": ["solution"], **tool.SOLUTION_METADATA}
    assert solution["outputs"][0]["data"] == {"text/plain": ["42"]}
    assert tool.main(["refresh"]) == 0
    assert path.read_text(encoding="utf-8") == text


def test_refresh_leaves_a_failing_notebook_alone(project):
    path = project("01_bad", code("print(1)"), code("1 / 0"))
    before = path.read_bytes()
    assert tool.main(["refresh"]) == 1
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == {path: before}


def test_run_goes_on_after_a_failure(project, tmp_path, capsys):
    project("01_bad", code("print(1)"), code("1 / 0"), code("print(2)"))
    hidden = code("6 * 7", metadata={"tags": ["solution"], **tool.SOLUTION_METADATA})
    good = project("02_good", markdown("[back](01_bad.ipynb)"), hidden)
    before = good.read_bytes()
    assert tool.main(["run"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^01_bad  FAILED\n(.*\n)*ZeroDivisionError", printed, re.MULTILINE)
    assert re.search(r"^02_good  [\d.]+ s$", printed, re.MULTILINE)
    bad = json.loads((tmp_path / "build/01_bad.ipynb").read_text(encoding="utf-8"))
    assert [len(cell["outputs"]) for cell in bad["cells"]] == [1, 1, 0]
    page = (tmp_path / "build/02_good.html").read_text(encoding="utf-8")
    assert 'href="01_bad.html"' in page
    assert ">Solution</summary>" in page
    assert good.read_bytes() == before


SEEDED = f"""\
import numpy as np
import torch
from lora_utils import check, draw
check("always", True)
check("a seed of torch", torch.manual_seed(1).initial_seed() == 1)
check("a generator's seed", torch.Generator().manual_seed(2).initial_seed() == 2)
check("a seed of numpy", np.random.default_rng(3).random() == {np.random.default_rng(3).random()})
check("the module's seed", draw() == 4)
check("one shift of two", torch.initial_seed() != 1004)"""


def test_seeds_reports_all_claims_that_fail(project, tmp_path, capsys):
    module = (tool.ROOT / "lora_utils.py").read_text(encoding="utf-8")
    module += "\n\ndef draw(seed=4):\n    return torch.manual_seed(seed).initial_seed()\n"
    (tmp_path / "lora_utils.py").write_text(module, encoding="utf-8")
    project("01_seeded", code(SEEDED), code("1 / 0"))
    assert tool.main(["seeds", "--shifts", "2"]) == 1
    table = capsys.readouterr().out.partition("claims failed")[2]
    for claim in ("torch", "a generator's seed", "numpy", "the module's seed", "ZeroDivision"):
        assert re.search(f"2 of 2 .*{claim}", table)
    assert re.search(r"1 of 2 .*one shift of two \(1000\)", table)
    assert "always" not in table


# The Makefile's set-up, with a stand-in for Python that notes what it is asked to do

FAKE_PYTHON = """\
#!/bin/sh
echo "$@" >> log
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m uv pip"*) exit ${UV_STATUS:-0} ;;
  "-m pip install -r"*) exit ${PIP_STATUS:-0} ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """A function that runs `make refresh` and returns its status and who installed what so far."""
    shutil.copy(tool.ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)

    def apply(**env):
        result = run(["make", "refresh", "PYTHON=./python"], tmp_path, **env)
        log = (tmp_path / "log").read_text()
        return result.returncode, re.findall(r"-m (uv|pip) .*-r requirements.txt", log)

    return apply


def test_set_up_happens_once_and_when_requirements_change(make, tmp_path):
    assert make() == (0, ["uv"])
    assert make() == (0, ["uv"])
    later = (tmp_path / ".venv/ready").stat().st_mtime + 10
    os.utime(tmp_path / "requirements.txt", (later, later))
    assert make()[1] == ["uv", "uv"]


def test_where_uv_fails_pip_installs_and_a_failed_set_up_is_tried_again(make):
    status, installed = make(UV_STATUS="1", PIP_STATUS="1")
    assert status != 0 and installed == ["uv", "pip"]
    assert make(UV_STATUS="1") == (0, ["uv", "pip", "uv", "pip"])


def test_an_old_python_is_named(make, tmp_path):
    pretend = (
        "import sys; sys.version_info = (3, 9, 1); sys.version = '3.9.1 old'; exec(sys.argv[1])"
    )
    (tmp_path / "python").write_text(f'#!/bin/sh\n"{sys.executable}" -c "{pretend}" "$2"\n')
    result = run(["make", "run", "PYTHON=./python"], tmp_path)
    assert result.returncode != 0 and "this is 3.9.1" in result.stderr
    assert not (tmp_path / ".venv").exists()
