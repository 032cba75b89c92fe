"""Try many learning rates for every method of notebook 5; write data/rates.json.

python experiments/sweep_rates.py

Each run adapts the base to rotated digits with 50 batches of 64, as the notebook does. First every
method runs at many rates, and errors are counted on 2,000 validation digits. Then it runs at the
best of these rates with six other seeds, and errors are counted on 2,000 test digits. It takes
some ten minutes with one thread. The file is written after each method, and a run that finds the
file does only what is missing in it; the notebook repeats some of its points.
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
TEST_SEEDS = (0, 1, 2, 3, 4, 5)  # these take no part in the choice of a rate

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


def only(*parts: str) -> Change:
    """Train only the parameters whose names contain one of `parts`."""

    def change(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))

    return change


def lora_and_rest(model: nn.Module) -> None:
    """LoRA of rank 8 on both large layers; the last layer and all biases are trained, too."""
    lora(8, alpha=16)(model)
    for name, parameter in model.named_parameters():
        if "fc3" in name or name.endswith("bias"):
            parameter.requires_grad_(True)


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
    "weights of fc1 and fc2": (only("fc1.weight", "fc2.weight"), rates(-5, -1), 50),
    "r = 8, fc3, biases": (lora_and_rest, rates(-3, 1), 50),
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
    """Run all methods at all rates, then each at its best; write after each method."""
    train, validation, test = lu.load_mnist(torch.device("cpu"))
    base = lu.pretrained_richboynet(torch.device("cpu"))
    rotated = lu.rotate(train)
    digits = {
        part: lu.rotate(lu.subset(d, slice(2000)))
        for part, d in (("validation", validation), ("test", test))
    }

    def errors_of(name: str, rate: float, seed: int, part: str) -> int:
        change, _, batches = METHODS[name]
        model = copy.deepcopy(base)
        torch.manual_seed(seed)
        change(model)
        lu.train_classifier(model, rotated, batches, batch_size=64, lr=rate)
        return lu.count_errors(model, digits[part])

    before = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    errors = {name: before.get("errors", {}).get(name, {}) for name in METHODS}
    tested = {name: before.get("test errors", {}).get(name, []) for name in METHODS}
    seconds = before.get("made", {}).get("CPU seconds", 0)
    for i, seed in enumerate(SEEDS):
        for name, (_, grid, _) in METHODS.items():
            for rate in grid:
                counts = errors[name].setdefault(f"{rate:.6g}", [])
                if len(counts) == i:
                    counts.append(errors_of(name, rate, seed, "validation"))
            write(errors, tested, seconds)
            print(
                seed, name, {rate: counts[i] for rate, counts in errors[name].items()}, flush=True
            )
    for i, seed in enumerate(TEST_SEEDS):
        for name in METHODS:
            best = min(errors[name], key=lambda rate: sum(errors[name][rate]))
            if len(tested[name]) == i:
                tested[name].append(errors_of(name, float(best), seed, "test"))
            write(errors, tested, seconds)
            print("test", seed, name, best, tested[name][i], flush=True)


def write(errors: dict, tested: dict, seconds: int) -> None:
    """Write the errors so far, and how they were made; earlier runs took `seconds`."""
    made = {
        "command": "python experiments/sweep_rates.py",
        "errors": "in the first 2,000 validation digits, rotated; one number a seed",
        "seeds": SEEDS,
        "test errors": "in the first 2,000 test digits, rotated, each at its best rate",
        "test seeds": TEST_SEEDS,
        "torch": torch.__version__,
        "CPU seconds": seconds + round(time.process_time()),
    }
    # One line a method: a file that can be read, and whose changes can be.
    lines = [f"  {quoted(name)}: {json.dumps(by_rate)}" for name, by_rate in errors.items()]
    after = [f"  {quoted(name)}: {json.dumps(counts)}" for name, counts in tested.items()]
    text = f'{{"made": {quoted(made)},\n"errors": {{\n' + ",\n".join(lines) + "\n},\n"
    text += '"test errors": {\n' + ",\n".join(after) + "\n}}\n"
    RESULT.write_text(text, encoding="utf-8", newline="\n")


def quoted(thing: object) -> str:
    """Return a thing as JSON that keeps α, √ and the like."""
    return json.dumps(thing, ensure_ascii=False)


if __name__ == "__main__":
    main()
