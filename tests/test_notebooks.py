"""The notebooks keep to the conventions."""

import re

import pytest

from conventions import RULES, Notebook
from tools.notebooks import NOTEBOOKS, ROOT

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_convention(path, rule):
    assert list(rule(Notebook(path))) == []


def test_readme_names_no_other_notebooks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"notebooks/(\w+\.ipynb)", text))
    assert named == {path.name for path in PATHS}
    assert named
