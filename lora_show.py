"""Looking at results: checks, comparisons, tables, colours and figures."""

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from inspect import getsource
from itertools import accumulate

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display
from matplotlib.colors import LinearSegmentedColormap

# --- Checks and comparisons -------------------------------------------------------------


def check(claim: str, condition: bool) -> None:
    """Print the claim with a tick if it holds, or raise an AssertionError that names it.

    Raises:
        TypeError: the condition is not one truth value (of Python, NumPy or PyTorch).
    """
    truth = condition.item() if getattr(condition, "ndim", None) == 0 else condition
    if not isinstance(truth, bool):
        raise TypeError(f"the condition must be true or false, not {condition!r}")
    if not truth:
        raise AssertionError(f"this does not hold: {claim}")
    print(f"✓ {claim}")


def relative_difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Return ‖ours − reference‖ / ‖reference‖ (Frobenius norms), and 0 for equal tensors.

    Infinities at the same places are equal and count in neither norm.
    """
    differences = _differences(ours, reference)
    if not differences.numel():
        return 0.0
    reference = _numbers(reference)
    size = torch.linalg.vector_norm(reference[reference.isfinite()])
    return (torch.linalg.vector_norm(differences) / size).item()


def compare(name: str, ours: torch.Tensor, reference: torch.Tensor) -> None:
    """Print whether two tensors are equal, equal up to rounding, and how far apart.

    "Up to rounding" is a relative difference below 1e-5, "far apart" the largest absolute one.
    """
    difference = relative_difference(ours, reference)
    differences = _differences(ours, reference).abs()
    largest = differences.max().item() if len(differences) else 0.0
    print(
        f"{name}: exact {difference == 0} | approximate {difference < 1e-5} "
        f"| largest difference {largest:.1e}"
    )


def _differences(ours: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return ours − reference where the two are not equal."""
    ours, reference = _numbers(ours), _numbers(reference)
    if ours.shape != reference.shape:
        raise ValueError(f"shapes {tuple(ours.shape)} and {tuple(reference.shape)} differ")
    unequal = ours != reference
    return ours[unequal] - reference[unequal]


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor or array on the CPU, in the widest type there is."""
    tensor = torch.as_tensor(tensor).detach().cpu()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Say whether two state dicts hold the same names, and under each the same bits.

    So types and shapes must agree, 0 and −0 differ, and NaN is the same as itself.
    """
    if ours.keys() != theirs.keys():
        return False
    return all(_bits(ours[name]) == _bits(theirs[name]) for name in ours)


def _bits(tensor: torch.Tensor) -> tuple:
    """Return what makes a tensor: its type, its shape and its bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes()


def table(rows: Iterable[tuple], head: tuple[str, str] = ("expected", "measured")) -> bool:
    """Print rows of (name, expected, measured), a tick where the two are equal; say if all are."""
    print(f"{'':32}{head[0]:>16}{head[1]:>16}  match")
    matches = []
    for name, expected, measured in rows:
        matches.append(expected == measured)
        print(f"{name:32}{expected:16,}{measured:16,}  {'✓' if matches[-1] else '✗'}")
    return all(matches)


def at_equal(path: Iterable[tuple[float, float]], level: float) -> float:
    """Return y where a path of points (x, y) first reaches x = level, on straight lines between.

    Raises:
        ValueError: x never reaches the level.
    """
    points = list(path)
    for (x, y), (next_x, next_y) in zip(points, points[1:], strict=False):
        if min(x, next_x) <= level <= max(x, next_x):
            return y if x == next_x else y + (next_y - y) * (level - x) / (next_x - x)
    raise ValueError(f"the path never reaches {level}")


def say(sentence: str) -> None:
    """Show a sentence of Markdown, so that prose can carry the numbers of this very run."""
    display(Markdown(sentence))


def show_source(*things: type | Callable, fold: str = "") -> None:
    """Show the source code of classes or functions, highlighted; with `fold`, under these words."""
    code = "```python\n" + "\n\n".join(map(getsource, things)) + "```"
    say(f"<details><summary>{fold}</summary>\n\n{code}\n\n</details>" if fold else code)


# --- Colours and figures ----------------------------------------------------------------

# One colour for each meaning, in all notebooks. Those of one group meet in a figure, and differ
# for colour-blind eyes, too. LoRA has a colour for each rank: rank_color.
COLORS = {
    # What is compared; "before" is the base, "after" what trained it
    "base": "#4d4d4d",
    "full": "#009e73",  # full fine-tuning
    "same layers": "#7fbc41",  # the layers that LoRA adapts, in full
    "equal budgets": "#93aad6",  # as many numbers, in different places
    "last layer": "#a6541f",
    "biases": "#dfb0a2",
    "replay": "#00a5e3",
    "theory": "#8c8c8c",
    # Parts of a training step
    "gradients": "#56b4e9",
    "optimizer": "#0072b2",
    "activations": "#f0e442",
    "logits": "#cc3311",
    "forward": "#bdbdbd",
    "backward": "#e0e0e0",
    # Codes of numbers in few bits, and the weights that they stand for
    "NF4": "#d55e00",
    "int4": "#2b3f8c",  # even steps
    "asymmetric": "#800000",  # even steps with a zero point
    "FP4": "#bf6fb4",
    "Lloyd–Max": "#17766b",
    "weights": "#d2cfc4",
    # Adapters combined: trained on both tasks, their factors added, TIES; a random update
    "joint": "#808000",
    "factors": "#e69f00",
    "TIES": "#12a3a3",
    "random": "#b8860b",
    # Rewards: thirteen numbers trained, tokens banned
    "13 numbers": "#a806f9",
    "ban": "#ae0404",
    # Texts
    "Austen": "#1b4f72",
    "Bible": "#8c6d00",
    "Shakespeare": "#d1495b",
    # Bits saved or lost
    "gain": "#5ab4ac",
    "loss": "#d8b365",
}


def rank_color(rank: int) -> tuple:
    """Return the colour that stands for LoRA of a rank, from light (1) to dark (64 and more)."""
    return plt.colormaps["plasma"](0.85 * (1 - (math.log2(min(rank, 64)) / 6) ** 0.7))


def set_plot_style() -> None:
    """Set the look of all figures, whatever this computer's own settings: 700 pixels wide."""
    plt.rcdefaults()
    plt.rc("figure", figsize=(7, 4), dpi=100)
    plt.rc("figure.constrained_layout", use=True)
    plt.rc("font", size=11)
    plt.rc("axes", grid=True, axisbelow=True, titlelocation="left")
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("grid", color="#e5e5e5")
    plt.rc("legend", frameon=False)


def show_figure(alt: str) -> None:
    """Show the figure just drawn as PNG, with a description for those who cannot see it."""
    file = io.BytesIO()
    plt.savefig(file, format="png", dpi=100, bbox_inches="tight")
    plt.close()
    picture = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": alt}
    display(picture, raw=True, metadata={"image/png": {"alt": alt}})


def show_images(images: torch.Tensor, titles: list[str], alt: str, columns: int = 10) -> None:
    """Draw grey images (N × height × width) in rows, each with its title."""
    rows = math.ceil(len(images) / columns)
    _, axes = plt.subplots(rows, columns, figsize=(7, 7 / columns * rows * 1.3), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    titled = zip(images.cpu().numpy(), titles, strict=True)
    for ax, (image, title) in zip(axes.flat, titled, strict=False):
        ax.imshow(image, cmap="gray")
        ax.set_title(title, fontsize=10, loc="center")
    show_figure(alt)


def show_boxes(rows: int, columns: int, rank: int, alt: str) -> None:
    """Draw W₀ (rows × columns), B (rows × rank) and A (rank × columns) as boxes to scale."""
    figure, ax = plt.subplots(figsize=(7, 1 + 2.5 * rows / columns))
    gap, x = 0.28 * columns, 0.0
    for name, height, width in (("W₀", rows, columns), ("B", rows, rank), ("A", rank, columns)):
        color = COLORS["base"] if name == "W₀" else rank_color(rank)
        bottom = (rows - height) / 2
        ax.add_patch(plt.Rectangle((x, bottom), width, height, color=color))
        label = f"{name}: {height:,} × {width:,}\n{'frozen' if name == 'W₀' else 'trained'}"
        ax.text(x + width / 2, bottom - 0.04 * rows, label, ha="center", va="top")
        x += width + gap
    ax.text(columns + gap / 2, rows / 2, "+ α/r", ha="center", va="center", fontsize=14)
    ax.text(columns + 1.5 * gap + rank, rows / 2, "·", ha="center", va="center", fontsize=20)
    ax.set(xlim=(0, x - gap), ylim=(-0.25 * rows, rows), aspect="equal")
    ax.axis("off")
    show_figure(alt)


def show_tokens(
    pieces: Sequence[str], gains: Sequence[float], alt: str, title: str = "", largest: float = 5
) -> None:
    """Write a text in pieces, its tokens, each on the colour of its gain; lines end at spaces.

    `largest` is the gain, in bits, at which the colours end.
    """
    colors = LinearSegmentedColormap.from_list("gain", [COLORS["loss"], "white", COLORS["gain"]])
    scale = plt.cm.ScalarMappable(plt.Normalize(-largest, largest), colors)
    gain_of = [gain for piece, gain in zip(pieces, gains, strict=True) for _ in piece]
    starts = set(accumulate(map(len, pieces), initial=0))
    lines, text = [[]], "".join(pieces)
    for i, letter in enumerate(text):
        word = re.match(r"\S*", text[i + 1 :])[0]
        if letter == "\n" or (letter == " " and len(lines[-1]) + len(word) >= 80):
            lines.append([])
        else:
            gap = 0.2 if i in starts else 0  # white, between tokens
            lines[-1].append((letter, scale.to_rgba(gain_of[i]), gap))
    figure, ax = plt.subplots(figsize=(7, 1 + 0.2 * len(lines)))
    for y, line in enumerate(lines):
        for x, (letter, color, gap) in enumerate(line):
            ax.add_patch(plt.Rectangle((x + gap, y), 1 - gap, 1, color=color, linewidth=0))
            ax.text(x + 0.5, y + 0.75, letter, ha="center", fontsize=10, family="monospace")
    ax.set(xlim=(0, 80), ylim=(len(lines), 0), xticks=[], yticks=[], frame_on=False, title=title)
    bar = figure.colorbar(scale, ax=ax, location="bottom", aspect=60, extend="both")
    bar.set_label(f"bits lost (brown) or saved (green) on each token; colours end at ±{largest:g}")
    show_figure(alt)
