"""Looking at results: checks, comparisons, tables, colours and figures."""

import math
from collections.abc import Callable, Iterable
from inspect import getsource

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display


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

    Raises:
        ValueError: the shapes differ.
    """
    ours, reference = _numbers(ours), _numbers(reference)
    if ours.shape != reference.shape:
        raise ValueError(f"shapes {tuple(ours.shape)} and {tuple(reference.shape)} differ")
    if torch.equal(ours, reference):
        return 0.0
    return (torch.linalg.norm(ours - reference) / torch.linalg.norm(reference)).item()


def compare(name: str, ours: torch.Tensor, reference: torch.Tensor) -> None:
    """Print whether two tensors are equal, equal up to rounding, and how far apart.

    "Up to rounding" is a relative difference below 1e-5, "far apart" the largest absolute one.
    """
    difference = relative_difference(ours, reference)
    apart = (_numbers(ours) - _numbers(reference)).abs()
    largest = apart.max().item() if apart.numel() else 0.0
    print(
        f"{name}: exact {difference == 0} | approximate {difference < 1e-5} "
        f"| largest difference {largest:.1e}"
    )


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor or array on the CPU, in the widest type there is."""
    return torch.as_tensor(tensor).detach().cpu().to(torch.complex128)


def same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Say whether two state dicts hold the same names and the same bits."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def table(rows: Iterable[tuple], head: tuple[str, str] = ("expected", "measured")) -> bool:
    """Print rows of (name, expected, measured), a tick where the two are equal; say if all are."""
    print(f"{'':32}{head[0]:>16}{head[1]:>16}  match")
    matches = []
    for name, expected, measured in rows:
        matches.append(expected == measured)
        print(f"{name:32}{expected:16,}{measured:16,}  {'✓' if matches[-1] else '✗'}")
    return all(matches)


def say(sentence: str) -> None:
    """Show a sentence of Markdown, so that prose can carry the numbers of this very run."""
    display(Markdown(sentence))


def show_source(thing: type | Callable) -> None:
    """Show the source code of a class or function, highlighted."""
    display(Markdown(f"```python\n{getsource(thing)}```"))


# One colour for each meaning, in all notebooks; colour-blind safe together.
COLORS = {
    "base": "#4d4d4d",
    "full": "#009e73",
    "theory": "#8c8c8c",
    "last layer": "#8c564b",
    "biases": "#c49c94",
    "gradients": "#56b4e9",
    "optimizer": "#0072b2",
    "activations": "#f0e442",
}


def rank_color(rank: int) -> tuple:
    """Return the colour that stands for LoRA of a rank, from light (1) to dark (64)."""
    return plt.colormaps["plasma"](0.85 * (1 - (math.log2(rank) / 6) ** 0.7))


def set_plot_style() -> None:
    """Set the look of all figures: 700 pixels wide, light grid, readable type."""
    plt.rc("figure", figsize=(7, 4), dpi=100)
    plt.rc("figure.constrained_layout", use=True)
    plt.rc("font", size=11)
    plt.rc("axes", grid=True, axisbelow=True, titlelocation="left")
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("grid", color="#e5e5e5")
    plt.rc("legend", frameon=False)


def show_figure(alt: str) -> None:
    """Show the figure just drawn, with a description for those who cannot see it."""
    display(plt.gcf(), metadata={"image/png": {"alt": alt}})
    plt.close()


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
