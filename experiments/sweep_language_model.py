"""Does LoRA forget less, and where should it sit? The trainings whose results notebook 7 shows.

python experiments/sweep_language_model.py    writes data/language_model_sweep.json

A run adapts the small language model to the Bible, as the notebook does. Seed CHOICE is measured
on validation text alone: for each method the search of the rate starts at a guess and goes on by
factors of 2 until the best rate lies between two worse ones. Then the method runs with the seeds
RESULT, which took no part in the choice, and is measured on the Bible's test text and on Austen's.
All methods under one seed see the same batches, so every comparison is a pair.

The methods of the two frontiers run at their best rate and at halves of it, and each run is also
measured at smaller strengths, with a part of its ΔW. Strength costs no training.

It takes about half an hour with one thread. The file is written after each run, and a script that
finds the file does only what is missing in it.
"""

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # one thread: sums in one order
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn as nn

from experiments.stored import DATA, store
from lora_tasks import (
    ATTENTION,
    MLP,
    bits_per_byte,
    load_language_model,
    load_text,
    train_language_model,
)
from lora_utils import add_lora, lora_layers, set_lora_strength

# --- What the notebooks import ------------------------------------------------------------------

SEVEN = ATTENTION + MLP  # the seven kinds of linear layer
Change = Callable[[nn.Module], None]  # decides, in place, what of a model is trained


def adapt(
    base: nn.Module, tokenizer, text: str, change: Change, rate: float, seed: int, steps: int = 120
) -> nn.Module:
    """Return a copy of the base, changed and then trained on the text."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)  # decides the start of A
    change(model)
    train_language_model(model, tokenizer, text, steps, rate, seed)  # the seed decides the batches
    return model


def lora(rank: int, alpha: float, targets: Sequence[str] = SEVEN) -> Change:
    """LoRA on these kinds of layer in all transformer layers."""
    return lambda model: add_lora(model, rank, alpha, targets)


def everything(model: nn.Module) -> None:
    """Full fine-tuning."""
    model.requires_grad_(True)


def seven_layers(model: nn.Module) -> None:
    """The layers that LoRA adapts in full: all but the embedding's table and the norms."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[-2] in SEVEN)


def weaken(model: nn.Module, base: nn.Module, strength: float) -> None:
    """Keep this part of what the training changed; LoRA's own is set_lora_strength."""
    if lora_layers(model):
        set_lora_strength(model, strength)
    else:
        W0 = base.state_dict()
        weaker = {name: W0[name].lerp(W, strength) for name, W in model.state_dict().items()}
        model.load_state_dict(weaker)


# --- The sweep ----------------------------------------------------------------------------------

CHOICE, RESULT = 0, (100, 101, 102, 103, 104)
STRENGTHS = (1, 0.75, 0.5)
IN_FULL, FULL = "seven layers in full", "all weights in full"


class Method(NamedTuple):
    """What to change, which rates to begin with, and at how many to measure (best, half, …)."""

    change: Change
    rates: tuple[float, ...]
    count: int = 1


METHODS = {
    "r = 64, α = 16": Method(lora(64, 16), (5e-3, 1e-2, 2e-2)),
    "r = 64, α = 64": Method(lora(64, 64), (2.5e-3, 5e-3, 1e-2)),
    "r = 64, α = 256": Method(lora(64, 256), (1.25e-3, 2.5e-3, 5e-3)),
    IN_FULL: Method(seven_layers, (2e-3, 4e-3, 8e-3), 3),
    "r = 4, α = 4": Method(lora(4, 4), (1e-2, 2e-2, 4e-2), 2),
    # Equal numbers in different places: 27,648
    "query, value": Method(lora(18, 18, ["q_proj", "v_proj"]), (1e-2, 2e-2, 4e-2)),
    "attention": Method(lora(9, 9, ATTENTION), (1e-2, 2e-2, 4e-2)),
    "MLP": Method(lora(8, 8, MLP), (1e-2, 2e-2, 4e-2)),
    FULL: Method(everything, (2e-3, 4e-3, 8e-3)),
}


def best_rate(measure: Callable[[float], float], rates: Sequence[float]) -> float:
    """Measure these rates, and on by factors of two until the best lies inside; return it."""
    found, best = {}, None
    while best is None or best in (min(found), max(found)):
        for rate in rates:
            found[rate] = measure(rate)
        best = min(found, key=found.get)
        rates = [rate for rate in (best / 2, best * 2) if rate not in found]
    return best


class Sweep:
    """Runs what is not yet in data/language_model_sweep.json."""

    def __init__(self):
        self.base, self.tokenizer = load_language_model("language_model", torch.device("cpu"))
        self.training, self.validation, bible = load_text("kjv")
        self.texts = {"Bible": bible, "Austen": load_text("austen_prideandprejudice")[2]}
        path = DATA / "language_model_sweep.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.earlier = before.get("made", {}).get("seconds") or 0
        found = before.get("results", {})
        self.chosen = found.get("validation", {})  # method: rate: bits per byte
        self.tested = found.get("test", {})  # method: rate: strength: text: bits of each seed
        self.at_base = found.get("base") or self.measure(self.base)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the bits per byte on each test text."""
        return {name: self.bits(model, text) for name, text in self.texts.items()}

    def bits(self, model: nn.Module, text: str) -> float:
        return round(bits_per_byte(model, self.tokenizer, text), 4)

    def adapt(self, name: str, rate: float, seed: int) -> nn.Module:
        change = METHODS[name].change
        return adapt(self.base, self.tokenizer, self.training, change, rate, seed)

    def choose(self, name: str) -> float:
        """Return the method's best rate on validation text."""
        bits = self.chosen.setdefault(name, {})

        def measure(rate: float) -> float:
            if f"{rate:g}" not in bits:
                bits[f"{rate:g}"] = self.bits(self.adapt(name, rate, CHOICE), self.validation)
                print(name, bits, flush=True)
                self.write()
            return bits[f"{rate:g}"]

        return best_rate(measure, METHODS[name].rates)

    def test(self, name: str, rate: float, strengths: Sequence[float]) -> None:
        """Run the seeds that are missing, and measure each run at all strengths."""
        found = self.tested.setdefault(name, {}).setdefault(f"{rate:g}", {})
        for strength in strengths:
            found.setdefault(f"{strength:g}", {"Bible": [], "Austen": []})
        done = len(found["1"]["Bible"])
        for seed in RESULT[done:]:
            model = self.adapt(name, rate, seed)
            trained = copy.deepcopy(model.state_dict())
            for strength in strengths:
                model.load_state_dict(trained)
                weaken(model, self.base, strength)
                for text, bits in self.measure(model).items():
                    found[f"{strength:g}"][text].append(bits)
            self.write()
        print("test", name, rate, found["1"], flush=True)

    def write(self) -> None:
        results = {"base": self.at_base, "validation": self.chosen, "test": self.tested}
        facts = {
            "validation": "bits per byte of the Bible's validation text, for each rate",
            "validation seed": CHOICE,
            "test": "bits per byte for each rate, strength and text, one number a seed",
            "test seeds": RESULT,
        }
        seconds = self.earlier + time.process_time()
        store("language_model_sweep.json", results, seconds, **facts)


def main() -> None:
    """Search the best rates, then measure; what the main notebook needs comes first."""
    sweep = Sweep()
    alphas = [name for name in METHODS if name.startswith("r = 64")]
    for name in alphas:
        sweep.choose(name)
    best_alpha = min(alphas, key=lambda name: min(sweep.chosen[name].values()))
    for name, method in METHODS.items():
        if name in alphas and name != best_alpha:
            continue
        best = sweep.choose(name)
        count = 3 if name == best_alpha else method.count
        for halvings in range(count):
            sweep.test(name, best / 2**halvings, STRENGTHS if count > 1 else (1,))


if __name__ == "__main__":
    main()
