"""The set-up cell in Jupyter and Colab, the tool's commands, and the Makefile's set-up."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import notebooks as tool

# Without what git and make tell their children: the tests start their own git and make.
CLEAN_ENV = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("GIT_")
    and name not in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "PYTHON")
}


def run(command, folder, **env):
    return subprocess.run(
        command, cwd=folder, env=CLEAN_ENV | env, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project's own files."""
    copy = tmp_path_factory.mktemp("copy") / "tree"
    generated = shutil.ignore_patterns(
        ".git", ".venv", "build", ".*_cache", "__pycache__", "*-ubyte"
    )
    return shutil.copytree(tool.ROOT, copy, ignore=generated)


def work_in(root, monkeypatch):
    """Let the tool work on another project."""
    monkeypatch.setattr(tool, "ROOT", root)
    monkeypatch.setattr(tool, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setattr(tool, "BUILD", root / "build")


# The set-up cell

IN_COLAB = """
import types
sys.modules["google.colab"] = types.ModuleType("google.colab")
"""
FIND_MODULE = """
import importlib.util
print(Path(importlib.util.find_spec("lora_utils").origin).resolve())
"""
USE_MODULE = """
import lora_utils
print(lora_utils.DATA)
"""


def run_setup_cell(folder, before="", after=FIND_MODULE, **env):
    code = "import sys\n" + before + tool.setup_cell() + "\n" + after
    return run([sys.executable, "-c", code], folder, **env)


@pytest.fixture(scope="module")
def remote(tree):
    """Environment variables that make git fetch the repository's address from the copy."""
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "All files"]):
        result = run(["git", *command], tree, GIT_CONFIG_GLOBAL=os.devnull)
        assert result.returncode == 0, result.stderr
    return {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{tree.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": tool.REPOSITORY,
    }


def test_colab_clones_once(tmp_path, remote):
    data = tmp_path / "lora-notebooks/data"
    first = run_setup_cell(tmp_path, IN_COLAB, USE_MODULE, **remote)
    assert first.stdout.strip() == str(data), first.stderr
    assert len(list(data.glob("MNIST/raw/*.gz"))) == 4
    again = run_setup_cell(tmp_path, IN_COLAB, GIT_ALLOW_PROTOCOL="none")
    assert again.stdout.strip() == str(tmp_path / "lora-notebooks/lora_utils.py"), again.stderr


def test_colab_stops_when_the_clone_fails(tmp_path, remote):
    missing = remote | {"GIT_CONFIG_KEY_0": f"url.{tmp_path.as_uri()}/missing.insteadOf"}
    result = run_setup_cell(tmp_path, IN_COLAB, **missing)
    assert result.returncode != 0
    assert "CalledProcessError" in result.stderr
    assert not (tmp_path / "lora-notebooks").exists()


def test_elsewhere_the_module_is_one_folder_up(tree):
    result = run_setup_cell(tree / "notebooks", GIT_ALLOW_PROTOCOL="none")
    assert result.stdout.strip() == str(tree / "lora_utils.py"), result.stderr
    assert not (tree / "notebooks/lora-notebooks").exists()


# stamp


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".git" not in path.parts
    }


def test_stamp_moves_to_another_address_and_back(tree, tmp_path, monkeypatch):
    copy = shutil.copytree(tree, tmp_path / "tree")
    work_in(copy, monkeypatch)
    old, new = tool.slug(), "somebody/another.name"
    before = contents(copy)

    def stamp(slug):
        monkeypatch.setattr(tool, "REPOSITORY", f"https://github.com/{slug}")
        assert tool.main(["stamp"]) == 0
        return contents(copy)

    after = stamp(new)
    assert {path for path in before if before[path] != after[path]} == {
        Path("README.md"),
        *(path.relative_to(copy) for path in tool.find_notebooks([])),
    }
    left = {path for path, text in after.items() if old.encode() in text}
    assert left == {Path("tools/notebooks.py")}  # the constant itself
    assert stamp(new) == after
    assert stamp(old) == before


# run and refresh


def code(source, **more):
    cell = {"cell_type": "code", "id": re.sub(r"\W+", "-", source)[:30], "metadata": {}}
    return cell | {"source": source, "execution_count": 7, "outputs": []} | more


def markdown(source):
    return {"cell_type": "markdown", "id": "text", "metadata": {}, "source": source}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project without notebooks, and a function that adds one to it."""
    (tmp_path / "notebooks").mkdir()
    work_in(tmp_path, monkeypatch)

    def add(name, *cells):
        metadata = {"kernelspec": {"name": "mine", "display_name": "Mine"}, "colab": {}}
        notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
        path = tmp_path / f"notebooks/{name}.ipynb"
        path.write_text(json.dumps(notebook), encoding="utf-8")
        return path

    return add


NOISY = """\
import sys
print("one")
print("careful", file=sys.stderr, flush=True)
print("two")"""
EDITED = {"execution": {"iopub.status.idle": "now"}, "collapsed": True, "tags": ["solution"]}


def test_refresh_cleans_and_repeats(project):
    path = project("01_tiny", code(NOISY), code("6 * 7", metadata=EDITED))
    assert tool.main(["refresh"]) == 0
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert notebook["metadata"] == tool.NOTEBOOK_METADATA
    noisy, solution = notebook["cells"]
    assert noisy == code(NOISY) | {
        "source": NOISY.splitlines(keepends=True),
        "execution_count": 1,
        "outputs": [{"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]}],
    }
    assert solution["metadata"] == {"tags": ["solution"], **tool.SOLUTION_METADATA}
    assert solution["outputs"][0]["data"] == {"text/plain": ["42"]}
    assert tool.main(["refresh"]) == 0
    assert path.read_text(encoding="utf-8") == text


def test_refresh_leaves_a_failing_notebook_alone(project, capsys):
    path = project("01_bad", code("print(1)"), code("1 / 0"))
    before = path.read_bytes()
    assert tool.main(["refresh"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_run_goes_on_after_a_failure(project, tmp_path, capsys):
    project("01_bad", code("print(1)"), code("1 / 0"), code("print(2)"))
    hidden = code("6 * 7", metadata={"tags": ["solution"], **tool.SOLUTION_METADATA})
    good = project("02_good", markdown("[back](01_bad.ipynb)"), hidden)
    before = good.read_bytes()
    assert tool.main(["run"]) == 1
    printed = capsys.readouterr().out
    assert "01_bad ... FAILED" in printed and "ZeroDivisionError" in printed
    bad = json.loads((tmp_path / "build/01_bad.ipynb").read_text(encoding="utf-8"))
    assert [len(cell["outputs"]) for cell in bad["cells"]] == [1, 1, 0]
    page = (tmp_path / "build/02_good.html").read_text(encoding="utf-8")
    assert 'href="01_bad.html"' in page
    assert ">Solution</summary>" in page
    assert good.read_bytes() == before


# The Makefile's set-up, with a stand-in for Python that notes what it is asked to do

FAKE_PYTHON = """\
#!/bin/sh
echo "$@" >> log
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *pip*) exit ${PIP_STATUS:-0} ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """A function that runs `make refresh` and returns its status and the count of installations."""
    shutil.copy(tool.ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)

    def apply(**env):
        result = run(["make", "refresh", "PYTHON=./python"], tmp_path, **env)
        return result.returncode, (tmp_path / "log").read_text().count("-m pip install")

    return apply


def test_set_up_happens_once_and_when_requirements_change(make, tmp_path):
    assert make() == (0, 1)
    assert make() == (0, 1)
    later = (tmp_path / ".venv/ready").stat().st_mtime + 10
    os.utime(tmp_path / "requirements.txt", (later, later))
    assert make()[1] == 2


def test_a_failed_installation_is_tried_again(make, tmp_path):
    status, installations = make(PIP_STATUS="1")
    assert status != 0 and installations == 1
    assert not (tmp_path / ".venv/ready").exists()
    assert make() == (0, 2)


def test_an_old_python_is_named(make, tmp_path):
    pretend = (
        "import sys; sys.version_info = (3, 9, 1); sys.version = '3.9.1 old'; exec(sys.argv[1])"
    )
    (tmp_path / "python").write_text(f'#!/bin/sh\n"{sys.executable}" -c "{pretend}" "$2"\n')
    result = run(["make", "run", "PYTHON=./python"], tmp_path)
    assert result.returncode != 0
    assert "Python 3.10 or newer is needed, this is 3.9.1" in result.stderr
    assert not (tmp_path / ".venv").exists()
