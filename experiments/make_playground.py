"""Give the site's playground an adapter for European handwriting.

python experiments/make_playground.py

Nearly all of MNIST was written in the USA. Its readers misread a 1 with a flag, a 9 with a curled
tail and a 0 with a slash, and are sure of it. Such digits are drawn here from strokes, as the page
draws a reader's own, and rank 4 learns them beside MNIST's digits. `tools/pages.py keep` writes
data/playground.safetensors anew; this script puts the adapter into it, and states what it reads.
"""

import json
import math
import random
import sys
import tempfile
from pathlib import Path

import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from lora_tasks import (  # noqa: E402
    DATA,
    Digits,
    count_errors,
    load_mnist,
    pretrained_richboynet,
    subset,
    train_classifier,
)
from lora_utils import CONFIG_FILE, WEIGHTS_FILE, add_lora, save_adapter  # noqa: E402
from playground import pack  # noqa: E402

STORED = DATA / "playground.safetensors"
PEN, SOFT = 1.15, 1.3  # as in playground/network.js
RANK, ALPHA, BATCHES, RATE = 4, 8, 600, 4e-3
SEED = 0

# --- Strokes, each a list of points (x, y) from 0 to 1 -------------------------------------------


def arc(x: float, y: float, width: float, height: float, begin: float, end: float) -> list:
    """Points on an ellipse around (x, y), from one angle to another, in quarter turns."""
    angles = [(begin + (end - begin) * i / 14) * math.pi / 2 for i in range(15)]
    return [(x + width * math.cos(a), y + height * math.sin(a)) for a in angles]


def one(rng: random.Random) -> list[list]:
    """A flag of any length, and a line; sometimes a foot."""
    length, wide = rng.uniform(0.15, 0.75), rng.uniform(0.15, 0.45)
    strokes = [[(0.55 - wide, 0.1 + length), (0.55, 0.1), (0.55, 0.9)]]
    if rng.random() < 0.3:
        strokes.append([(0.55 - 0.2, 0.9), (0.55 + 0.2, 0.9)])
    return strokes


def plain_one(rng: random.Random) -> list[list]:
    return [[(0.5, 0.1), (0.5, 0.9)]]


def seven(rng: random.Random) -> list[list]:
    """With a bar or without, with a serif or without."""
    foot = rng.uniform(0.3, 0.55)
    top = [(0.2, 0.12), (0.8, 0.12), (foot, 0.9)]
    if rng.random() < 0.3:
        top.insert(0, (0.2, 0.25))
    strokes = [top]
    if rng.random() < 0.7:
        middle = rng.uniform(0.42, 0.58)
        strokes.append([(0.35, middle), (0.8, middle)])
    return strokes


def nine(rng: random.Random) -> list[list]:
    """A ring and a tail that curls to the left, little or much, high or low."""
    ring = arc(0.5, 0.3, rng.uniform(0.18, 0.28), rng.uniform(0.15, 0.22), 0, -4)
    reach, low = rng.uniform(0.05, 0.5), rng.uniform(0.08, 0.22)
    right = ring[0][0]
    tail = arc(right - reach / 2, 0.9 - low, reach / 2, low, 0, rng.uniform(1.2, 2.4))
    return [[*ring, *tail]]


def zero(rng: random.Random) -> list[list]:
    """An ellipse, most often with a slash, which may stick out."""
    wide, out = rng.uniform(0.22, 0.36), rng.uniform(-0.12, 0.14)
    strokes = [arc(0.5, 0.5, wide, 0.4, -1, 3)]
    if rng.random() < 0.8:
        strokes.append([(0.5 + wide + out, 0.15 - out), (0.5 - wide - out, 0.85 + out)])
    return strokes


STYLES = [(one, 1), (one, 1), (plain_one, 1), (seven, 7), (nine, 9), (nine, 9), (zero, 0)]


def written(strokes: list[list], rng: random.Random) -> list[list]:
    """The strokes as a hand writes them: slanted, turned, wide or narrow, never straight."""
    slant, turn, wide = rng.gauss(0, 0.15), rng.gauss(0, 0.1), rng.uniform(0.65, 1.2)
    waves = [(rng.uniform(1, 4), rng.uniform(0, 7), rng.gauss(0, 0.02)) for _ in range(4)]
    result = []
    for stroke in strokes:
        shift = rng.gauss(0, 0.02), rng.gauss(0, 0.02)
        points = [(x + rng.gauss(0, 0.012), y + rng.gauss(0, 0.012)) for x, y in stroke]
        fine = []
        for (ax, ay), (bx, by) in zip(points, points[1:], strict=False):
            steps = max(1, round(math.hypot(bx - ax, by - ay) / 0.06))
            fine += [(ax + (bx - ax) * i / steps, ay + (by - ay) * i / steps) for i in range(steps)]
        fine.append(points[-1])
        line = []
        for x, y in fine:
            x += sum(size * math.sin(often * 3 * y + at) for often, at, size in waves[:2])
            y += sum(size * math.sin(often * 3 * x + at) for often, at, size in waves[2:])
            x, y = wide * (x - 0.5) + slant * (0.5 - y), y - 0.5
            x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
            line.append((x + shift[0], y + shift[1]))
        result.append(line)
    return result


def rasterise(strokes: list[list]) -> torch.Tensor:
    """The image (28 × 28, from 0 to 1) that playground/network.js makes of strokes."""
    points = torch.tensor([point for stroke in strokes for point in stroke])
    low, high = points.amin(0), points.amax(0)
    zoom = (20 - 2 * PEN) / (high - low).max()
    begins = torch.tensor([a for stroke in strokes for a in [stroke[0], *stroke[:-1]]])
    centre, begins, ends = (low + high) / 2, begins, points
    begins, ends = 13.5 + zoom * (begins - centre), 13.5 + zoom * (ends - centre)
    image = paint(begins, ends)
    grid = torch.arange(28.0)
    mass = torch.stack([image.sum(0) @ grid, image.sum(1) @ grid]) / image.sum()
    return paint(begins + 13.5 - mass, ends + 13.5 - mass)


def paint(begins: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    pixels = torch.stack([columns, rows], dim=-1).view(-1, 1, 2)
    line = ends - begins
    along = ((pixels - begins) * line).sum(-1) / line.square().sum(-1).clamp(min=1e-12)
    nearest = begins + along.clamp(0, 1).unsqueeze(-1) * line
    distance = (pixels - nearest).norm(dim=-1).amin(dim=1)
    return (0.5 + (PEN - distance) / SOFT).clamp(0, 1).view(28, 28)


def europeans(count: int, seed: int, styles: list) -> Digits:
    rng = random.Random(seed)
    images, labels = [], []
    for _ in range(count):
        style, label = rng.choice(styles)
        images.append((rasterise(written(style(rng), rng)) - 0.1307) / 0.3081)
        labels.append(label)
    return Digits(torch.stack(images), torch.tensor(labels))


def join(*parts: Digits) -> Digits:
    return Digits(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


def unpack(folder: Path) -> tuple[dict[str, Path], torch.Tensor]:
    """Write the adapters that are stored into folders; return these, and the order of pixels."""
    tensors = safetensors.torch.load_file(STORED)
    with safetensors.safe_open(STORED, "pt") as file:
        settings = json.loads(file.metadata()["adapters"])
    folders = {name: folder / name for name in settings if name != "european"}
    for name, path in folders.items():
        path.mkdir()
        mine = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{name}/")}
        safetensors.torch.save_file(mine, path / WEIGHTS_FILE)
        (path / CONFIG_FILE).write_text(json.dumps(settings[name]))
    return folders, tensors["digits/pixel_order"].long()


def main() -> None:
    torch.manual_seed(SEED)
    train, validation, test = load_mnist(torch.device("cpu"))
    drawn = europeans(8_000, SEED, STYLES)
    model = pretrained_richboynet(torch.device("cpu"))
    add_lora(model, RANK, ALPHA, ["fc1", "fc2", "fc3"])
    shuffled = join(drawn, subset(train, slice(16_000)))
    train_classifier(model, shuffled, BATCHES, 128, RATE)
    base = pretrained_richboynet(torch.device("cpu"))
    for style, label in dict.fromkeys(STYLES):
        fresh = europeans(1_000, SEED + 1, [(style, label)])
        wrong = [count_errors(network, fresh) / 10 for network in (base, model)]
        print(f"{style.__name__:10} misread: {wrong[0]:5.1f} %, adapted {wrong[1]:4.1f} %")
    for name, digits in (("validation", validation), ("test", test)):
        print(f"MNIST, {name}: {count_errors(base, digits)}, {count_errors(model, digits)} errors")
    with tempfile.TemporaryDirectory() as folder:
        folders, order = unpack(Path(folder))
        folders["european"] = Path(folder) / "european"
        save_adapter(model, folders["european"])
        flagged = europeans(50, SEED + 2, [(one, 1)])
        digits = join(subset(test, slice(950)), flagged)
        STORED.write_bytes(pack(base, folders, digits, order))


if __name__ == "__main__":
    main()
