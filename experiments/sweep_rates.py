"""Errors over rank, α and learning rate for the two notebooks 05; write data/rates.json.

python experiments/sweep_rates.py

A run adapts notebook 3's base to rotated digits, with 50 batches of 64. For each method the search
of the rate starts at a guess and goes on by factors of 2 until the best rate lies between two
worse ones: errors in 2,000 validation digits (in the long runs 10,000), the mean of two seeds.
Where the rule for LoRA's rate, 0.01·√(16/α), falls halfway between two of these rates, it is
tried, too. Then the method runs at its best rate with fresh seeds, and errors are counted on all
10,000 test digits. Where a rank is tested at its best α, validation has chosen the α, too: of two
that tie, the smaller. At each rank α was tried on both sides of the best one.

α is a second knob that full fine-tuning lacks. So full fine-tuning, and its two large weights
alone, are also tried with one: a rate of its own for fc1.

It takes about three quarters of an hour with one thread. The file is written after each training,
and a run that finds the file does only what is missing in it.
"""

import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # one thread: sums in one order
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from experiments.stored import DATA, store
from lora_tasks import (
    Digits,
    count_errors,
    load_mnist,
    pretrained_richboynet,
    rotate,
    subset,
    train_classifier,
)
from lora_utils import LoRALinear, add_lora, lora_layers

# --- What the notebooks import ------------------------------------------------------------------

Change = Callable[[nn.Module], None]  # decides, in place, what of a model is trained


def adapt(
    base: nn.Module, digits: Digits, change: Change, rate: float, seed: int, batches: int = 50
) -> tuple[nn.Module, list[float]]:
    """Return a copy of the base that has learnt the digits, and the loss of each batch."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)  # decides the start of A
    change(model)
    torch.manual_seed(seed)  # decides the order of the digits: the same for every method
    losses = train_classifier(model, digits, batches, batch_size=64, lr=rate)
    return model, losses


def moved_A(base: nn.Module, model: nn.Module, change: Change, seed: int) -> list[float]:
    """How far each A of an adapted model is from its start, as a share of its size there."""
    start = copy.deepcopy(base)
    torch.manual_seed(seed)  # as in adapt
    change(start)
    shares = []
    for before, after in zip(lora_layers(start).values(), lora_layers(model).values(), strict=True):
        distance = (after.lora_A - before.lora_A).norm() / before.lora_A.norm()
        shares.append(distance.item())
    return shares


def everything(model: nn.Module) -> None:
    """Full fine-tuning."""
    model.requires_grad_(True)


def only(*parts: str) -> Change:
    """Train only the parameters whose names contain one of the parts."""

    def change(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))

    return change


def lora(rank: int, alpha: float, start: Callable[[LoRALinear], None] | None = None) -> Change:
    """LoRA on both large layers, with another start of the factors if one is given."""

    def change(model: nn.Module) -> None:
        add_lora(model, rank, alpha, targets=["fc1", "fc2"])
        for layer in lora_layers(model).values() if start else ():
            start(layer)

    return change


class Slowed(nn.Module):
    """The start of a parameter + factor · V, where V is trained in its place, from zero.

    Adam moves V by about the rate in a step, and so the parameter by the factor times the rate.
    """

    def __init__(self, start: torch.Tensor, factor: float):
        super().__init__()
        self.register_buffer("start", start.detach().clone())
        self.factor = factor

    def forward(self, V: torch.Tensor) -> torch.Tensor:
        return self.start + self.factor * V

    def right_inverse(self, parameter: torch.Tensor) -> torch.Tensor:
        return (parameter - self.start) / self.factor


def own_rate(change: Change, factor: float) -> Change:
    """As `change`, but what is trained of fc1 has a rate of its own: factor times the others'."""

    def changed(model: nn.Module) -> None:
        change(model)
        for name, parameter in list(model.fc1.named_parameters(recurse=False)):
            if parameter.requires_grad:
                slowed = Slowed(parameter, factor)
                parametrize.register_parametrization(model.fc1, name, slowed)

    return changed


def lora_name(rank: int, alpha: float) -> str:
    """The name of a setting in rates.json."""
    return f"r = {rank}, α = {alpha:g}"


def peft_name(alpha: float) -> str:
    """The name of rank 64 with A as PEFT starts it, and PEFT's α."""
    return f"r = 64, lora_alpha = {alpha:g} in PEFT"


def own_rate_name(name: str, times: str) -> str:
    """The name of a method whose fc1 has a rate of its own."""
    return f"{name}, rate of fc1 × {times}"


# --- Other starts of the factors ----------------------------------------------------------------


def large_A(layer: LoRALinear) -> None:
    """A with standard deviation 1 in place of 1/√n."""
    layer.lora_A.data.normal_()


def frozen_A(layer: LoRALinear) -> None:
    """A stays as it was drawn."""
    layer.lora_A.requires_grad_(False)


def both_random(layer: LoRALinear) -> None:
    """B is random too, and W₀ − sBA is stored, so that the model starts as the base."""
    layer.lora_B.data.normal_(std=1 / math.sqrt(layer.rank))
    layer.base.weight.data -= layer.delta_W().detach()


def peft_A(layer: LoRALinear) -> None:
    """A as PEFT starts it: uniform up to 1/√n, a standard deviation smaller by √3."""
    bound = 1 / math.sqrt(layer.lora_A.shape[1])
    layer.lora_A.data.uniform_(-bound, bound)


def pissa(layer: LoRALinear) -> None:
    """Factors from the largest singular directions of W₀, which leave it (PiSSA)."""
    weight = layer.base.weight.data
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[: layer.rank] / layer.scaling).sqrt()
    layer.lora_B.data = U[:, : layer.rank] * root
    layer.lora_A.data = root[:, None] * Vh[: layer.rank]
    weight -= layer.delta_W().detach()


def lora_and_rest(model: nn.Module) -> None:
    """LoRA of rank 8 on both large layers; the last layer and all biases are trained, too."""
    lora(8, alpha=16)(model)
    for name, parameter in model.named_parameters():
        if "fc3" in name or name.endswith("bias"):
            parameter.requires_grad_(True)


# --- The sweep ----------------------------------------------------------------------------------

SEEDS = (100, 101)  # those that choose; the base has seed 0
FEW, MANY = 6, 20  # so many fresh seeds test: 0 to 5, or 0 to 19
TWO_WEIGHTS = "weights of fc1 and fc2"
CUTS = (1, 2, 4, 8, 16, 64, None)  # None: the whole update
ALPHAS = {
    1: (1, 2, 4, 16, 64),
    2: (1, 2, 4, 8, 16),
    4: (1, 2, 4, 8, 16, 32),
    8: (1, 4, 8, 16, 32, 64, 256, 1024),
    16: (16, 32, 64, 128, 256, 1024),
    64: (8, 16, 32, 64, 128, 256, 512, 1024, 4096),
    128: (1024, 2048, 4096),
    256: (2048, 4096, 8192),
}
PEFT_ALPHAS = (8, 16, 32, 64, 128, 768)  # at rank 64
FC1 = ("1/64", "1/16", "1/4", "4")  # the rate of fc1 as a multiple of the others'


class Method(NamedTuple):
    """What to change, which rates to begin with (0.01·2^k), how many batches, the rule's rate."""

    change: Change
    ks: range
    batches: int = 50
    rule: float | None = None  # k again


def rule_k(alpha: float) -> float:
    """The rule's rate as 0.01·2^k: four times the α, half the rate."""
    return -0.5 * math.log2(alpha / 16)


METHODS = {
    "full": Method(everything, range(-4, 3)),
    TWO_WEIGHTS: Method(only("fc1.weight", "fc2.weight"), range(-4, 0)),
}
for rank, alphas in ALPHAS.items():
    for alpha in alphas:
        guess = round(rule_k(alpha))
        ks = range(-4, 3) if alpha == 16 else range(guess - 1, guess + 2)
        if rank == 8 and alpha <= 256:  # deeper/05 shows all of these at one rate, 0.005
            ks = range(min(ks[0], -1), max(ks[-1], -1) + 1)
        if rank > 1 and alpha == 16 * rank**0.5:  # rsLoRA: deeper/05 shows its curves
            ks = range(-4, 2)
        METHODS[lora_name(rank, alpha)] = Method(lora(rank, alpha), ks, rule=rule_k(alpha))
METHODS |= {
    "r = 8, A std 1": Method(lora(8, 16, large_A), range(-4, -1)),
    **{f"r = {r}, A frozen": Method(lora(r, 16, frozen_A), range(1, 4)) for r in (1, 8, 64, 256)},
    "r = 8, both random": Method(lora(8, 16, both_random), range(-2, 1)),
    "r = 8, PiSSA": Method(lora(8, 16, pissa), range(-2, 1)),
    "r = 8, fc3, biases": Method(lora_and_rest, range(-2, 1)),
    "last layer": Method(only("fc3"), range(-1, 2)),
    "biases": Method(only("bias"), range(4, 7)),
}
for alpha in PEFT_ALPHAS:
    guess = round(rule_k(alpha))
    change = lora(64, alpha, peft_A)
    METHODS[peft_name(alpha)] = Method(change, range(guess - 1, guess + 2), rule=rule_k(alpha))
BORROWER = lora_name(8, 16)  # also tested at the best rate of full fine-tuning
for name in ("full", TWO_WEIGHTS):
    for times in FC1:
        factor = float(Fraction(times))
        guess = round(-2 - 0.5 * math.log2(factor))  # the two rates' geometric mean stays 0.0025
        ks = range(guess - 1, guess + 2)
        METHODS[own_rate_name(name, times)] = Method(own_rate(METHODS[name].change, factor), ks)
LONG = ", 200 batches"
LONG_ALPHAS = {
    64: (16, 32, 128, 256, 512, 1024, 2048),
    128: (1024, 2048, 4096, 8192),
    256: (2048, 4096, 8192, 16384),
}
LONG_FC1 = ("1/64", "1/16", "1/4")
for name in ("full", TWO_WEIGHTS):
    METHODS[name + LONG] = METHODS[name]._replace(batches=200)
    for times in LONG_FC1:
        own = own_rate_name(name, times)
        METHODS[own + LONG] = METHODS[own]._replace(batches=200)
for rank, alphas in LONG_ALPHAS.items():
    for alpha in alphas:
        guess = round(rule_k(alpha))
        METHODS[lora_name(rank, alpha) + LONG] = Method(
            lora(rank, alpha), range(guess - 1, guess + 2), 200, rule_k(alpha)
        )


def own_rate_names(name: str) -> list[str]:
    """A method at one rate, then with those of fc1 that were tried."""
    return [name, *(own_rate_name(name, times) for times in FC1)]


def long_names(rank: int) -> list[str]:
    """LoRA of a rank in the long runs, with each α that was tried there."""
    return [lora_name(rank, alpha) + LONG for alpha in LONG_ALPHAS[rank]]


def long_own_rate_names(name: str) -> list[str]:
    """A method in the long runs, with each rate of fc1 that was tried there."""
    return [own_rate_name(name, times) + LONG for times in LONG_FC1]


def rate_key(k: float) -> str:
    """The rate 0.01·2^k, as it is written in the file."""
    return f"{0.01 * 2.0**k:.6g}"


def best_rate(errors: dict[str, list[int]]) -> float:
    """The rate with the fewest validation errors, on average over the seeds."""
    means = {float(rate): sum(n) / len(n) for rate, n in errors.items() if len(n) == len(SEEDS)}
    return min(means, key=means.get)


def least_errors(errors: dict[str, list[int]]) -> float:
    """The mean validation errors at the best rate."""
    counts = errors[f"{best_rate(errors):.6g}"]
    return sum(counts) / len(counts)


class Sweep:
    """Runs what is not yet in data/rates.json."""

    def __init__(self):
        train, validation, test = load_mnist(torch.device("cpu"))
        self.train, self.test = rotate(train), rotate(test)
        self.validation = rotate(validation)
        self.part = subset(self.validation, slice(2000))
        self.base = pretrained_richboynet(torch.device("cpu"))
        path = DATA / "rates.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.earlier = before.get("made", {}).get("seconds", 0)
        found = before.get("results", {})
        self.chosen = found.get("validation", {})  # method: rate: errors of each seed
        self.tested = found.get("test", {})  # method: errors of each seed, at its best rate
        self.borrowed = found.get("test at the best rate of full", {})
        self.cuts = found.get("test of the cut", {})  # rank: errors of each seed

    def errors(self, name: str, rate: float, seed: int, digits: Digits) -> int:
        method = METHODS[name]
        model, _ = adapt(self.base, self.train, method.change, rate, seed, method.batches)
        return count_errors(model, digits)

    def search(self, name: str, waiting: list[int]) -> None:
        """Try rates until the best one has a worse one on both sides."""
        errors = self.chosen.setdefault(name, {})
        while waiting:
            for k in waiting:
                self.try_rate(name, k)
            whole = {rate: errors[rate] for rate in map(rate_key, range(-20, 20)) if rate in errors}
            best = round(math.log2(best_rate(whole) / 0.01))
            beside = (best - 1, best + 1)
            waiting = [k for k in beside if len(errors.get(rate_key(k), [])) < len(SEEDS)]
        if METHODS[name].rule is not None:
            self.try_rate(name, METHODS[name].rule)
        self.chosen[name] = dict(sorted(errors.items(), key=lambda item: float(item[0])))
        print(name, self.chosen[name], flush=True)
        self.write()

    def try_rate(self, name: str, k: float) -> None:
        """Count validation errors at the rate 0.01·2^k with the seeds that are missing."""
        counts = self.chosen[name].setdefault(rate_key(k), [])
        for seed in SEEDS[len(counts) :]:
            digits = self.validation if name.endswith(LONG) else self.part
            counts.append(self.errors(name, float(rate_key(k)), seed, digits))
            self.write()

    def run_test(self, name: str, seeds: int, rate: float, counts: list[int]) -> None:
        """Count errors on test digits with the seeds that are missing."""
        for seed in range(len(counts), seeds):
            counts.append(self.errors(name, rate, seed, self.test))
            self.write()
        print("test", name, rate, sum(counts) / len(counts), counts, flush=True)

    def test_best(self, name: str, seeds: int) -> None:
        """Test a method at the rate that validation has chosen."""
        counts = self.tested.setdefault(name, [])
        self.run_test(name, seeds, best_rate(self.chosen[name]), counts)

    def best(self, names: list[str]) -> str:
        """The method with the fewest errors on validation digits; at a tie the first."""
        return min(names, key=lambda name: least_errors(self.chosen[name]))

    def best_alpha(self, rank: int) -> str:
        """The best setting of this rank; of two that tie, that with the smaller α."""
        return self.best([lora_name(rank, alpha) for alpha in ALPHAS[rank]])

    def cut(self) -> None:
        """Keep only the largest directions of what full training adds to the two weights."""
        rate = best_rate(self.chosen[TWO_WEIGHTS])
        for seed in range(len(self.cuts.get("whole", [])), FEW):
            model, _ = adapt(self.base, self.train, METHODS[TWO_WEIGHTS].change, rate, seed)
            updates = {}
            for layer in ("fc1", "fc2"):
                W0 = self.base.get_submodule(layer).weight.detach()
                W = model.get_submodule(layer).weight.detach()
                updates[layer] = torch.linalg.svd(W - W0, full_matrices=False)
            for rank in CUTS:
                model = copy.deepcopy(self.base)
                for layer, (U, S, Vh) in updates.items():
                    delta = (U[:, :rank] * S[:rank]) @ Vh[:rank]
                    model.get_submodule(layer).weight.data += delta
                name = str(rank) if rank else "whole"
                self.cuts.setdefault(name, []).append(count_errors(model, self.test))
            print("cut", seed, {name: counts[-1] for name, counts in self.cuts.items()}, flush=True)
            self.write()

    def write(self) -> None:
        results = {"validation": self.chosen, "test": self.tested}
        results["test at the best rate of full"] = self.borrowed
        results["test of the cut"] = self.cuts
        facts = {
            "validation": "errors in 2,000 rotated validation digits, for each rate and seed",
            "validation of 200 batches": "the same in 10,000 digits",
            "validation seeds": SEEDS,
            "test": "errors in 10,000 rotated test digits at the best rate, for seeds 0, 1, …",
            "test of the cut": f"the same of {TWO_WEIGHTS}, of whose ΔW rank r is kept",
            "processors": "two; a run repeated on the other one differs by a few errors",
        }
        store("rates.json", results, self.earlier + time.process_time(), **facts)


def main() -> None:
    """Search the rate of every method, then test each at its best, the main notebook's first."""
    sweep = Sweep()
    main_methods = ["full", TWO_WEIGHTS, *(name for name in METHODS if "α" in name)]
    main_methods = [name for name in main_methods if LONG not in name and "fc1 ×" not in name]
    rest = [name for name in METHODS if name not in main_methods and LONG not in name]
    for name in main_methods:
        sweep.search(name, list(METHODS[name].ks))
    best = [sweep.best_alpha(rank) for rank in ALPHAS]
    shown = best + [lora_name(rank, alpha) for rank in (1, 8, 64) for alpha in ALPHAS[rank]]
    shown += [lora_name(rank, 16) for rank in (2, 4, 16)] + ["full", TWO_WEIGHTS]
    shown += [lora_name(4, 32), lora_name(16, 64)]  # rsLoRA, for deeper/05
    shown.append(lora_name(2, 2))  # as good as the best, 8
    many = {"full", TWO_WEIGHTS, *(sweep.best_alpha(rank) for rank in (64, 128, 256))}
    for name in filter(shown.__contains__, METHODS):
        sweep.test_best(name, MANY if name in many else FEW)
    full = best_rate(sweep.chosen["full"])
    sweep.run_test(BORROWER, FEW, full, sweep.borrowed.setdefault(BORROWER, []))
    sweep.cut()
    for name in rest:
        sweep.search(name, list(METHODS[name].ks))
        if "fc1 ×" not in name:
            sweep.test_best(name, FEW)
    for name in ("full", TWO_WEIGHTS):
        sweep.test_best(sweep.best(own_rate_names(name)), MANY)
    for name in filter(lambda name: name.endswith(LONG), METHODS):
        k = METHODS[name].ks[1]
        if short := sweep.chosen.get(name.removesuffix(LONG)):  # begin at its best rate
            k = round(math.log2(best_rate(short) / 0.01))
        sweep.search(name, [k - 1, k, k + 1])
    shown = [name + LONG for name in ("full", TWO_WEIGHTS, "r = 64, α = 16", "r = 64, α = 32")]
    for name in ("full", TWO_WEIGHTS):  # the best, and what was best in the short runs
        shown += [sweep.best(long_own_rate_names(name)), own_rate_name(name, "1/16") + LONG]
    for name in shown + [sweep.best(long_names(rank)) for rank in LONG_ALPHAS]:
        sweep.test_best(name, MANY)


if __name__ == "__main__":
    main()
