"""The helpers to look at results, and the promise that the module explains itself."""

import inspect

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

import lora_utils
from lora_utils import (
    COLORS,
    check,
    compare,
    plot_errors_per_digit,
    rank_color,
    say,
    set_plot_style,
    show_images,
    show_source,
)


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """Note how often figures are shown, close them at the end and undo the style."""
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    with plt.rc_context():
        yield shown
    plt.close("all")


# --- check and compare -----------------------------------------------------------------


@pytest.mark.parametrize("condition", [True, torch.tensor(True), np.bool_(True)])
def test_check_prints_what_holds(capsys, condition):
    check("B A x equals W x", condition)
    assert capsys.readouterr().out == "✓ B A x equals W x\n"


@pytest.mark.parametrize("condition", [False, torch.tensor(False), np.bool_(False)])
def test_check_raises_what_does_not_hold_and_prints_nothing(capsys, condition):
    with pytest.raises(AssertionError, match="B A x equals W x"):
        check("B A x equals W x", condition)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("ours", "reference", "line"),
    [
        ([1.0, 2.0], [1.0, 2.0], "exact True | approximate True | largest difference 0.0e+00"),
        ([1.0, 2.0], [1.0, 2.5], "exact False | approximate False | largest difference 5.0e-01"),
        ([1.0, -3.0], [1.0, 1.0], "exact False | approximate False | largest difference 4.0e+00"),
        ([1, 2], [1, 4], "exact False | approximate False | largest difference 2.0e+00"),
    ],
)
@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_compare_prints_how_far_apart(capsys, kind, ours, reference, line):
    compare("W", kind(ours), kind(reference))
    compare("W", kind(reference), kind(ours))
    assert capsys.readouterr().out == f"W: {line}\n" * 2


def test_compare_tells_rounding_from_error(capsys):
    ours = torch.tensor([1.0, 2.0])
    compare("W", ours, torch.nextafter(ours, torch.tensor(3.0)))
    assert "exact False | approximate True | largest difference 2.4e-07" in capsys.readouterr().out


@pytest.mark.parametrize(
    "reference", [np.ones(3), torch.ones(3).double(), torch.ones(3).bfloat16(), np.ones(3, int)]
)
def test_compare_takes_arrays_and_tensors_of_any_dtype(capsys, reference):
    compare("W", torch.ones(3, requires_grad=True), reference)
    assert "exact True | approximate True | largest difference 0.0e+00" in capsys.readouterr().out


def test_compare_refuses_different_shapes(capsys):
    with pytest.raises(ValueError, match=r"\(3,\) and \(2, 3\)"):
        compare("W", torch.ones(3), torch.ones(2, 3))
    assert capsys.readouterr().out == ""


def test_say_and_show_source_display_markdown(monkeypatch):
    displayed = []
    monkeypatch.setattr(lora_utils, "display", displayed.append)
    say("**42** parameters")
    show_source(lora_utils.LoRALinear)
    sentence, source = (markdown.data for markdown in displayed)
    assert sentence == "**42** parameters"
    assert source == f"```python\n{inspect.getsource(lora_utils.LoRALinear)}```"


# --- Figures ---------------------------------------------------------------------------


def test_figures_are_700_pixels_wide():
    set_plot_style()
    figure, _ = plt.subplots()
    assert figure.get_size_inches()[0] * figure.dpi == 700


def luminance(color):
    return np.dot(to_rgba(color)[:3], [0.2126, 0.7152, 0.0722])


def test_rank_colors_grow_darker_with_the_rank():
    ranks = [1, 2, 3, 4, 5, 8, 12, 16, 32, 64]
    steps = [luminance(rank_color(rank)) for rank in ranks]
    assert all(a > b for a, b in zip(steps, steps[1:], strict=False))
    assert steps[0] < 0.8  # still visible on white
    assert len(rank_color(4)) == 4


def test_each_meaning_has_a_color_of_its_own():
    colors = [to_rgba(c) for c in COLORS.values()] + [rank_color(r) for r in (1, 2, 3, 4, 8, 64)]
    for i, color in enumerate(colors):
        assert all(np.abs(np.subtract(color, other)).max() > 0.05 for other in colors[:i])


def test_images_are_drawn_in_rows_with_their_titles(shown):
    images = torch.rand(5, 4, 6)
    show_images(images, list("abcde"), columns=3)
    [figure] = shown
    assert len(figure.axes) == 6
    for ax, image, title in zip(figure.axes, images, "abcde", strict=False):
        assert ax.get_title() == title and not ax.axison
        np.testing.assert_array_equal(ax.images[0].get_array(), image)
        assert ax.images[0].get_cmap().name == "gray"
    assert not figure.axes[5].images and not figure.axes[5].axison
    positions = [ax.get_subplotspec() for ax in figure.axes[:5]]
    assert [(p.rowspan[0], p.colspan[0]) for p in positions] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1)
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 10, 1), (10, 10, 1), (11, 10, 2)])
def test_images_take_as_many_rows_as_they_need(shown, count, columns, rows):
    show_images(torch.rand(count, 2, 2), ["x"] * count, columns)
    assert len(shown[0].axes) == rows * columns
    assert sum(bool(ax.images) for ax in shown[0].axes) == count


def test_each_image_needs_a_title():
    with pytest.raises(ValueError):
        show_images(torch.rand(3, 2, 2), ["a", "b"])


def test_errors_are_drawn_as_bars_around_their_digit(shown):
    set_plot_style()
    errors = {"base": torch.arange(10), "LoRA": torch.arange(10) * 2}
    plot_errors_per_digit(errors, ["black", "red"], "What changed?")
    [ax] = shown[0].axes
    assert ax.get_title("left") == "What changed?"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("true digit", "wrong answers")
    assert ax.get_xticks().tolist() == list(range(10))
    assert ax.get_ylim()[0] == 0
    for bars, (name, counts), color in zip(
        ax.containers, errors.items(), ["black", "red"], strict=True
    ):
        assert bars.get_label() == name
        assert [bar.get_height() for bar in bars] == counts.tolist()
        assert {bar.get_facecolor() for bar in bars} == {to_rgba(color)}
    left, right = ([bar.get_x() for bar in bars] for bars in ax.containers)
    width = ax.containers[0][0].get_width()
    np.testing.assert_allclose(np.array(left) + width, np.arange(10), atol=1e-12)
    np.testing.assert_allclose(right, np.arange(10), atol=1e-12)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["base", "LoRA"]


@pytest.mark.parametrize("groups", [1, 3])
def test_bars_do_not_touch_those_of_the_next_digit(shown, groups):
    plot_errors_per_digit({str(i): torch.ones(10) for i in range(groups)}, ["k"] * groups, "")
    [ax] = shown[0].axes
    bars = sorted(bar.get_x() for group in ax.containers for bar in group)
    width = ax.containers[0][0].get_width()
    assert len(bars) == 10 * groups and width * groups == pytest.approx(0.8)
    assert all(b - a >= width - 1e-9 for a, b in zip(bars, bars[1:], strict=False))
    assert bars[0] == pytest.approx(-0.4)


def test_bars_of_one_name_need_no_legend(shown):
    plot_errors_per_digit({"base": torch.ones(10)}, ["k"], "")
    assert shown[0].axes[0].get_legend() is None


def test_bars_need_a_color_each():
    with pytest.raises(ValueError):
        plot_errors_per_digit({"a": torch.ones(10)}, [], "")


# --- The module explains itself --------------------------------------------------------


def public():
    """All classes and functions of the module that a reader may call, with methods."""
    for name, thing in vars(lora_utils).items():
        if name.startswith("_") or getattr(thing, "__module__", "") != "lora_utils":
            continue
        yield name, thing
        if inspect.isclass(thing):
            for method, function in vars(thing).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{name}.{method}", function
                if isinstance(function, property):
                    yield f"{name}.{method}", function.fget


def test_everything_public_is_found():
    names = dict(public())
    assert len(names) > 30
    assert {"add_lora", "LoRALinear.forward", "LoRAFactors.scaling", "lora_disabled"} <= set(names)


@pytest.mark.parametrize(("name", "thing"), list(public()))
def test_everything_public_has_a_docstring_and_types(name, thing):
    assert thing.__doc__ and thing.__doc__.strip().endswith((".", ":", "`."))
    function = thing.__init__ if inspect.isclass(thing) else thing
    if "__init__" in vars(thing) or inspect.isfunction(thing):
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.name != "self"]
        assert all(p.annotation is not inspect.Parameter.empty for p in parameters)
        if inspect.isfunction(thing):
            assert signature.return_annotation is not inspect.Signature.empty
