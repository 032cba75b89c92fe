"""Try many learning rates for every method of notebook 5; write data/rates.json.

python tools/sweep_rates.py

Each run adapts the base to rotated digits with 50 batches of 64, as the notebook does, and counts
errors on 2,000 validation digits. Nothing here sees a test digit, and the notebook reports on
other seeds. It takes some six minutes with one thread. The file is written after each method, so
that a run that is stopped leaves what it has; the notebook repeats some of its points.
"""

import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # one thread: sums in one order
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402

import lora_utils as lu  # noqa: E402

RESULT = ROOT / "data" / "rates.json"
SEEDS = (100, 101)  # of A and of the order of the digits; the base has seed 0

Change = Callable[[nn.Module], None]  # decides in place what of a model may change, and its start


def rates(first: int, last: int) -> list[float]:
    """Return a grid of factor 2 through 0.01."""
    return [0.01 * 2.0**k for k in range(first, last + 1)]


def lora(rank: int, alpha: float, start: Callable[[lu.LoRALinear], None] | None = None) -> Change:
    """LoRA on both large layers, with another start of the factors if one is given."""

    def change(model: nn.Module) -> None:
        lu.add_lora(model, rank, alpha, targets=["fc1", "fc2"])
        for layer in lu.lora_layers(model).values() if start else ():
            start(layer)

    return change


def everything(model: nn.Module) -> None:
    """Full fine-tuning."""
    model.requires_grad_(True)


def only(end: str) -> Change:
    """Train only the parameters whose names contain `end`."""

    def change(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(end in name)

    return change


def large_A(layer: lu.LoRALinear) -> None:
    """A with standard deviation 1 in place of 1/√n."""
    layer.lora_A.data.normal_()


def frozen_A(layer: lu.LoRALinear) -> None:
    """A stays as it was drawn."""
    layer.lora_A.requires_grad_(False)


def both_random(layer: lu.LoRALinear) -> None:
    """B is random too, and W₀ − sBA is stored, so that the model starts as the base."""
    layer.lora_B.data.normal_(std=1 / math.sqrt(layer.rank))
    layer.base.weight.data -= layer.delta_W().detach()


def pissa(layer: lu.LoRALinear) -> None:
    """Factors from the largest singular directions of W₀, which leave it (PiSSA)."""
    weight = layer.base.weight.data
    if weight.shape not in SVD:
        SVD[weight.shape] = torch.linalg.svd(weight, full_matrices=False)
    U, S, Vh = SVD[weight.shape]
    root = (S[: layer.rank] / layer.scaling).sqrt()
    layer.lora_B.data = U[:, : layer.rank] * root
    layer.lora_A.data = root[:, None] * Vh[: layer.rank]
    weight -= layer.delta_W().detach()


SVD: dict[torch.Size, tuple] = {}  # of W₀, by its shape: takes seconds, is always the same

# Name: what to change, which rates (wide enough that the best is never the first or the last),
# how many batches. The module computes α/r, so α = 16√r gives it a scaling of 16/√r.
METHODS: dict[str, tuple[Change, list[float], int]] = {
    "full": (everything, rates(-5, -1), 50),
    "last layer": (only("fc3"), rates(-2, 2), 50),
    "biases": (only("bias"), rates(3, 7), 50),
}
for r in (1, 2, 4, 8, 16, 32, 64):
    METHODS[f"r = {r}"] = (lora(r, alpha=16), rates(-3, 2), 50)
for r in (4, 16, 64):
    METHODS[f"r = {r}, α/√r"] = (lora(r, alpha=16 * math.sqrt(r)), rates(-5, 1), 50)
for alpha, grid in ((1, rates(-2, 3)), (4, rates(-3, 2)), (64, rates(-4, 1)), (256, rates(-5, 0))):
    METHODS[f"r = 8, α = {alpha}"] = (lora(8, alpha), grid, 50)
for label, start, grid in (
    ("A std 1", large_A, rates(-5, 0)),
    ("A frozen", frozen_A, rates(-1, 4)),
    ("both random", both_random, rates(-4, 1)),
    ("PiSSA", pissa, rates(-5, 0)),
):
    METHODS[f"r = 8, {label}"] = (lora(8, 16, start), grid, 50)
METHODS["full, 200 batches"] = (everything, rates(-5, -1), 200)
METHODS["r = 8, 200 batches"] = (lora(8, alpha=16), rates(-3, 1), 200)


def main() -> None:
    """Run all methods with the first seed, then with the next, and write after each method."""
    train, validation, _ = lu.load_mnist(torch.device("cpu"))
    base = lu.pretrained_richboynet(train)
    rotated = lu.rotate(train)
    held_out = lu.rotate(lu.subset(validation, slice(2000)))
    errors: dict[str, dict[str, list[int]]] = {name: {} for name in METHODS}
    for seed in SEEDS:
        for name, (change, grid, batches) in METHODS.items():
            for rate in grid:
                model = copy.deepcopy(base)
                torch.manual_seed(seed)
                change(model)
                lu.train_classifier(model, rotated, batches, batch_size=64, lr=rate)
                count = lu.count_errors(model, held_out)
                errors[name].setdefault(f"{rate:.6g}", []).append(count)
            print(seed, name, {rate: e[-1] for rate, e in errors[name].items()}, flush=True)
            write(errors)


def write(errors: dict) -> None:
    """Write the errors so far, and how they were made."""
    made = {
        "command": "python tools/sweep_rates.py",
        "counted": "errors in the first 2,000 validation digits, rotated; one number a seed",
        "seeds": SEEDS,
        "torch": torch.__version__,
        "CPU seconds": round(time.process_time()),
    }
    # One line a method: a file that can be read, and whose changes can be.
    lines = [f"  {quoted(name)}: {json.dumps(by_rate)}" for name, by_rate in errors.items()]
    text = f'{{"made": {quoted(made)},\n"errors": {{\n' + ",\n".join(lines) + "\n}}\n"
    RESULT.write_text(text, encoding="utf-8", newline="\n")


def quoted(thing: object) -> str:
    """Return a thing as JSON that keeps α, √ and the like."""
    return json.dumps(thing, ensure_ascii=False)


if __name__ == "__main__":
    main()
