"""The helpers to look at results, and the promise that the modules explain themselves."""

import base64
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

import lora_bits
import lora_chat
import lora_show
import lora_tasks
import lora_utils

ROOT = Path(lora_show.__file__).parent


@pytest.fixture
def shown(monkeypatch):
    """Return what is displayed, and undo the style."""
    shown = []
    monkeypatch.setattr(lora_show, "display", lambda thing, **options: shown.append(thing))
    with plt.rc_context():
        yield shown
    assert not plt.get_fignums()  # or the notebook would show the figure twice


# --- check, compare, table ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [bool, torch.tensor, np.bool_])
def test_check_ticks_what_holds_and_names_what_does_not(capsys, kind):
    lora_show.check("B A x equals W x", kind(True))
    assert capsys.readouterr().out == "✓ B A x equals W x\n"
    with pytest.raises(AssertionError, match="B A x equals W x"):
        lora_show.check("B A x equals W x", kind(False))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "condition", [[False], torch.tensor(float("nan")), torch.ones(1), 1, "no", None, np.ones(1)]
)
def test_check_takes_nothing_but_one_truth_value(capsys, condition):
    with pytest.raises(TypeError):
        lora_show.check("x", condition)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("ours", "reference", "exact", "approximate", "largest"),
    [
        ([1.0, 2.0], [1.0, 2.0], True, True, "0.0e+00"),
        ([1.0, -3.0], [1.0, 1.0], False, False, "4.0e+00"),
        ([1, 2], [1.0, 2.0], True, True, "0.0e+00"),
        ([1.0, 1.0], [1.0, 1.0 + 9e-6], False, True, "8.9e-06"),
        ([1.0, 1.0], [1.0, 1.0 + 2e-5], False, False, "2.0e-05"),
        ([1e-2, 1e-6], [1e-2, 1e-6 + 3.5e-8], False, True, "3.5e-08"),  # small gradients
        ([1e-9], [2e-9], False, False, "1.0e-09"),
        (np.float64([1]), np.float64([1 + 1e-12]), False, True, "1.0e-12"),
        ([1.0 + 1j], [1.0 - 1j], False, False, "2.0e+00"),
        ([], [], True, True, "0.0e+00"),
        ([1.0], [0.0], False, False, "1.0e+00"),
        ([float("nan")], [1.0], False, False, "nan"),
        (np.uint8([1]), np.uint8([2]), False, False, "1.0e+00"),
        ([True], [False], False, False, "1.0e+00"),
        (torch.ones(2, requires_grad=True), torch.ones(2).bfloat16(), True, True, "0.0e+00"),
    ],
)
def test_compare_tells_rounding_from_error(capsys, ours, reference, exact, approximate, largest):
    line = f"W: exact {exact} | approximate {approximate} | largest difference {largest}\n"
    lora_show.compare("W", ours, reference)
    assert capsys.readouterr().out == line


@pytest.mark.parametrize(
    "function", [lora_show.relative_difference, lambda *pair: lora_show.compare("W", *pair)]
)
def test_tensors_of_different_shapes_cannot_be_compared(capsys, function):
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 3\)"):
        function(torch.ones(3), torch.ones(2, 3))
    assert capsys.readouterr().out == ""


def test_the_relative_difference_is_that_of_the_norms():
    ours, reference = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert lora_show.relative_difference(ours, reference) == 1
    assert lora_show.relative_difference(ours, ours * 2) == 0.5
    assert lora_show.relative_difference(ours, torch.zeros(2, 2)) == float("inf")


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("ours", "reference", "expected"),
    [
        ([INF, 1.0], [INF, 2.0], 0.5),
        ([INF, -INF], [INF, -INF], 0),
        ([INF, 3.0], [-INF, 3.0], INF),
        ([INF, 3.0], [1.0, 3.0], INF),
        ([1.0, 3.0], [INF, 3.0], INF),
        ([NAN, 3.0], [1.0, 3.0], NAN),
        ([NAN], [NAN], NAN),
    ],
)
def test_equal_infinities_do_not_count(ours, reference, expected):
    found = lora_show.relative_difference(ours, reference)
    np.testing.assert_equal(found, expected)


def test_same_tensors_means_names_and_bits():
    ours = {"a": torch.ones(2), "b": torch.zeros(1)}
    assert lora_show.same_tensors(ours, {"b": torch.zeros(1), "a": torch.ones(2)})
    for change in ({"b": torch.ones(1)}, {"b": torch.zeros(2)}, {"c": torch.zeros(1)}):
        assert not lora_show.same_tensors(ours, ours | change)
        assert not lora_show.same_tensors(ours | change, ours)


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        (torch.tensor(NAN), torch.tensor(NAN), True),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), False),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(2), False),
        (torch.zeros(2, 3), torch.zeros(3, 2), False),
        (torch.ones(2, 3).T, torch.ones(3, 2), True),
        (torch.ones(3).bfloat16(), torch.ones(3).bfloat16(), True),
        (torch.tensor([True]), torch.tensor([False]), False),
        (torch.zeros(0), torch.zeros(0), True),
        (torch.ones(2, requires_grad=True), torch.ones(2), True),
    ],
)
def test_the_same_bits(ours, theirs, same):
    assert lora_show.same_tensors({"W": ours}, {"W": theirs}) is same


def test_at_equal_reads_between_the_points_of_a_path():
    path = [(10, 0), (6, 4), (2, 20), (5, 30)]
    assert [lora_show.at_equal(path, level) for level in (10, 8, 6, 3)] == [0, 2, 4, 16]
    assert lora_show.at_equal([(1, 7), (1, 9)], 1) == 7
    with pytest.raises(ValueError, match="never reaches 11"):
        lora_show.at_equal(path, 11)


def test_a_table_marks_what_matches(capsys):
    assert lora_show.table([("fc1", 1784, 1784), ("fc2", 2, 2)], head=("formula", "counted"))
    assert not lora_show.table([("fc1", 3, 4), ("fc2", 2, 2), ("fc3", 4, 3)])
    first, second = capsys.readouterr().out.split("expected")
    assert first.count("✓") == 2 and "✗" not in first
    assert all(word in first for word in ("formula", "counted", "fc1", "1,784"))
    assert (second.count("✓"), second.count("✗")) == (1, 2)


def test_say_and_show_source_display_markdown(shown):
    lora_show.say("**42** parameters")
    things = lora_utils.LoRALinear, lora_utils.add_lora
    lora_show.show_source(*things)
    sources = "\n\n".join(inspect.getsource(thing) for thing in things)
    assert shown.pop().data == f"```python\n{sources}```"
    assert shown.pop().data == "**42** parameters"
    lora_show.show_source(*things, fold="The code")
    folded = f"<details><summary>The code</summary>\n\n```python\n{sources}```\n\n</details>"
    assert shown.pop().data == folded


# --- Figures ---------------------------------------------------------------------------


# What colour-blind eyes make of linear RGB (Machado and others, 2009; severity 1).
EYES = {
    "all cones": np.eye(3),
    "no red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def seen(color, eyes):
    """Return a colour's place in CIE Lab, where a distance of 2 or 3 can just be seen."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(XYZ @ np.clip(EYES[eyes] @ linear, 0, 1) / XYZ.sum(axis=1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


TOGETHER = [  # what may meet in one figure
    "base, full, same layers, equal budgets, replay, r1, r4, r8, r64",
    "base, full, last layer, biases, r1, r4, r8, r64, theory",
    "base, gradients, optimizer, activations, logits",
    "forward, backward, gradients, r8",
    "NF4, int4, asymmetric, FP4, Lloyd–Max, theory, weights, base",
    "joint, factors, TIES, r4, r8, base",
    "random, r4, theory",
    "13 numbers, ban, biases, r1, r4, full, base, theory",
    "Austen, Bible, Shakespeare, theory",
    "gain, loss",
]


def test_colors_that_meet_differ_for_all_eyes_and_no_color_has_two_meanings():
    colors = lora_show.COLORS | {f"r{rank}": lora_show.rank_color(rank) for rank in (1, 4, 8, 64)}
    for group in TOGETHER:
        for a, b in itertools.combinations(group.split(", "), 2):
            apart = {e: np.linalg.norm(seen(colors[a], e) - seen(colors[b], e)) for e in EYES}
            assert min(apart.values()) > 8, (a, b, apart)
    for a, b in itertools.combinations(colors, 2):
        assert np.linalg.norm(seen(colors[a], "all cones") - seen(colors[b], "all cones")) > 5
    assert colors.keys() <= set(", ".join(TOGETHER).split(", "))


def test_rank_colors_grow_darker():
    ranks = [lora_show.rank_color(rank) for rank in (1, 2, 3, 4, 5, 8, 12, 16, 32, 64)]
    light = [seen(color, "all cones")[0] for color in ranks]
    assert light == sorted(light, reverse=True) and light[0] < 85  # visible on white
    assert lora_show.rank_color(256) == ranks[-1]


def test_images_are_drawn_with_their_titles_and_described(shown, monkeypatch):
    described = []
    monkeypatch.setattr(lora_show, "show_figure", described.append)
    images = torch.rand(5, 4, 6)
    lora_show.show_images(images, list("abcde"), "five digits", columns=3)
    axes = plt.gcf().axes
    assert described == ["five digits"] and [ax.get_title() for ax in axes] == [*"abcde", ""]
    assert not any(ax.axison for ax in axes)
    for ax, image in zip(axes, images, strict=False):
        np.testing.assert_array_equal(ax.images[0].get_array(), image)
    plt.close()


def test_tokens_stand_in_lines_on_the_colors_of_their_gains(shown, monkeypatch):
    monkeypatch.setattr(lora_show, "show_figure", lambda alt: None)
    pieces = ["And", " the", " LORD", "\n", "spa", "ke"] + [" unto"] * 20
    gains = [0, -5, 5, 3, -9, 9] + [2.5] * 20
    lora_show.show_tokens(pieces, gains, "a text", "A title")
    ax = plt.gcf().axes[0]
    lines = {}
    for text in ax.texts:
        lines.setdefault(text.get_position()[1], []).append(text.get_text())
    lines = ["".join(line) for _, line in sorted(lines.items())]
    assert lines == ["And the LORD", "spake" + " unto" * 15, "unto" + " unto" * 4]
    [white, *_, green] = [patch.get_facecolor()[:3] for patch in ax.patches[:12]]
    assert white == pytest.approx((1, 1, 1), abs=0.01)
    assert green == pytest.approx(to_rgb(lora_show.COLORS["gain"]), abs=0.01)
    assert ax.patches[14].get_facecolor()[:3] == pytest.approx(
        to_rgb(lora_show.COLORS["loss"]), abs=0.01
    )
    assert ax.get_title() == "A title" or ax.get_title("left") == "A title"
    plt.close()


FIGURE = """
import matplotlib.pyplot as plt
import lora_show
published = []
get_ipython().display_pub.publish = lambda data, metadata, **_: published.append((data, metadata))
lora_show.set_plot_style()
plt.plot([1, 2])
lora_show.show_figure("two points")
[(data, metadata)] = published
assert metadata == {"image/png": {"alt": "two points"}} and data["text/plain"] == "two points"
assert not plt.get_fignums()
print("PNG:", data["image/png"])
"""


@pytest.mark.parametrize("backend", ["svg", "module://matplotlib_inline.backend_inline"])
def test_figures_are_png_with_a_description_whatever_the_settings(backend, tmp_path):
    (tmp_path / "profile_default").mkdir()
    settings = "c.InlineBackend.figure_formats = {'svg'}\nc.InlineBackend.rc = {'figure.dpi': 20}\n"
    (tmp_path / "profile_default" / "ipython_config.py").write_text("c = get_config()\n" + settings)
    (tmp_path / "matplotlibrc").write_text("figure.dpi: 20\nsavefig.format: pdf\nsavefig.dpi: 31\n")
    (tmp_path / "figure.ipy").write_text(FIGURE)
    names = {"MPLBACKEND": backend, "IPYTHONDIR": tmp_path, "MATPLOTLIBRC": tmp_path}
    environment = os.environ | names | {"PYTHONPATH": ROOT}
    command = [sys.executable, "-m", "IPython", tmp_path / "figure.ipy"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "PNG:" in ran.stdout, ran
    picture = base64.b64decode(ran.stdout.split("PNG:")[1].split()[0])
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert 680 <= int.from_bytes(picture[16:20], "big") <= 720  # the width


# --- The module explains itself --------------------------------------------------------


MODULES = [lora_utils, lora_tasks, lora_show, lora_bits, lora_chat]
NAMED = [item for module in MODULES for item in vars(module).items()]
PUBLIC = [thing for name, thing in NAMED if not name.startswith("_")]
OURS = {module.__name__ for module in MODULES}
PUBLIC = {thing for thing in PUBLIC if inspect.isroutine(thing) or inspect.isclass(thing)}
PUBLIC = sorted((t for t in PUBLIC if t.__module__ in OURS), key=lambda t: t.__qualname__)


@pytest.mark.parametrize("thing", PUBLIC)
def test_everything_public_has_a_docstring_and_types(thing):
    methods = vars(thing).values() if inspect.isclass(thing) else ()
    for function in (
        thing,
        *(m for m in methods if inspect.isfunction(m) and m.__name__[0] != "_"),
    ):
        assert inspect.getdoc(function)
        if inspect.isfunction(function):
            signature = inspect.signature(function)
            untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
            assert [name for name in untyped if name not in ("self", "ctx", "args", "kwargs")] == []
            assert signature.return_annotation is not signature.empty
