"""The helpers to look at results, and the promise that the module explains itself."""

import inspect

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

import lora_show
import lora_utils as lora


@pytest.fixture
def shown(monkeypatch):
    """Return what is displayed, and undo the style."""
    shown = []
    monkeypatch.setattr(
        lora, "display", lambda *things, **options: shown.append((*things, options))
    )
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


def test_same_tensors_means_names_and_bits():
    ours = {"a": torch.ones(2), "b": torch.zeros(1)}
    assert lora_show.same_tensors(ours, {"b": torch.zeros(1), "a": torch.ones(2)})
    for change in ({"b": torch.ones(1)}, {"b": torch.zeros(2)}, {"c": torch.zeros(1)}):
        assert not lora_show.same_tensors(ours, ours | change)
        assert not lora_show.same_tensors(ours | change, ours)


def test_a_table_marks_what_matches(capsys):
    assert lora_show.table([("fc1", 1784, 1784), ("fc2", 2, 2)], head=("formula", "counted"))
    assert not lora_show.table([("fc1", 3, 4), ("fc2", 2, 2), ("fc3", 4, 3)])
    first, second = capsys.readouterr().out.split("expected")
    assert first.count("✓") == 2 and "✗" not in first
    assert all(word in first for word in ("formula", "counted", "fc1", "1,784"))
    assert (second.count("✓"), second.count("✗")) == (1, 2)


def test_say_and_show_source_display_markdown(shown):
    lora_show.say("**42** parameters")
    for thing in (lora.LoRALinear, lora.add_lora):
        lora_show.show_source(thing)
        assert shown.pop()[0].data == f"```python\n{inspect.getsource(thing)}```"
    assert shown.pop()[0].data == "**42** parameters"


# --- Figures ---------------------------------------------------------------------------


def test_rank_colors_grow_darker_and_each_meaning_has_its_own():
    ranks = [lora_show.rank_color(rank) for rank in (1, 2, 3, 4, 5, 8, 12, 16, 32, 64)]
    light = [np.dot(color[:3], [0.2126, 0.7152, 0.0722]) for color in ranks]
    assert light == sorted(light, reverse=True) and light[0] < 0.8  # visible on white
    colors = [to_rgba(color) for color in lora_show.COLORS.values()] + ranks[::3]
    for i, color in enumerate(colors):
        assert all(np.abs(np.subtract(color, other)).max() > 0.05 for other in colors[:i])


def test_images_are_drawn_with_their_titles_700_pixels_wide_and_described(shown):
    lora_show.set_plot_style()
    images = torch.rand(5, 4, 6)
    lora_show.show_images(images, list("abcde"), "five digits", columns=3)
    [(figure, options)] = shown
    assert options["metadata"]["image/png"]["alt"] == "five digits"
    assert figure.get_size_inches()[0] * figure.dpi == 700
    assert [ax.get_title() for ax in figure.axes] == [*"abcde", ""]
    assert not any(ax.axison for ax in figure.axes)
    for ax, image in zip(figure.axes, images, strict=False):
        np.testing.assert_array_equal(ax.images[0].get_array(), image)


# --- The module explains itself --------------------------------------------------------


PUBLIC = [thing for name, thing in vars(lora).items() if not name.startswith("_")]
PUBLIC = [thing for thing in PUBLIC if getattr(thing, "__module__", "") == "lora_utils"]


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
            assert untyped in ([], ["self"])
            assert signature.return_annotation is not signature.empty
