"""Where should LoRA sit, and does it forget less? The trainings whose results notebook 7 shows.

python experiments/sweep_language_model.py    writes data/language_model_sweep.json; 18 CPU minutes

Each training adapts the small language model to the Bible, as notebook 7 does. The seed CHOICE is
measured on validation text alone, and chooses the learning rate of each method. The seeds RESULT
took no part in the choice. They are measured on the Bible's test text, and on Austen. The results
are bits per byte: for each method, text and learning rate a list, one number a seed.
"""

import copy
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from experiments.stored import store  # noqa: E402
from lora_tasks import (  # noqa: E402
    ATTENTION,
    MLP,
    bits_per_byte,
    load_language_model,
    load_text,
    train_language_model,
)
from lora_utils import add_lora, lora_layers, set_lora_strength  # noqa: E402

STEPS, CHOICE, RESULT = 120, 0, (100, 101, 102, 103, 104)

# Rank and targets; the first three train exactly as many numbers.
METHODS = {
    "query, value": (18, ["q_proj", "v_proj"]),
    "attention": (9, ATTENTION),
    "MLP": (8, MLP),
    "all, r = 1": (1, ATTENTION + MLP),
    "all, r = 4": (4, ATTENTION + MLP),
    "full": None,
}
FRONTIER = {  # these are measured at more rates than their best
    "all, r = 4": (5e-3, 2e-2),
    "full": (5e-4, 2e-3),
}
# The control: full fine-tuning of the layers that LoRA adapts, without the table and the norms.
CONTROL, CONTROL_RATES = "full, seven layers", (5e-4, 2e-3, 4e-3)
# These are measured at a smaller strength, too: with a part of their ΔW.
WEAKENED, STRENGTHS = {"all, r = 4": 2e-2, "full": 2e-3, CONTROL: 2e-3}, (0.75, 0.5)


def load():
    return load_language_model("language_model", torch.device("cpu"))


def adapt(method: str, text: str, rate: float, seed: int):
    """Return the model and its tokenizer, trained on the text."""
    model, tokenizer = load()
    torch.manual_seed(seed)
    if method == CONTROL:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[-2] in ATTENTION + MLP)
    elif METHODS[method]:
        rank, targets = METHODS[method]
        add_lora(model, rank, alpha=rank, targets=targets)
    train_language_model(model, tokenizer, text, STEPS, rate, seed)
    return model, tokenizer


def weaken(model, strength: float) -> None:
    """Keep this part of ΔW, the change that the training made."""
    if lora_layers(model):
        set_lora_strength(model, strength)
        return
    base = load()[0].state_dict()
    model.load_state_dict({n: base[n].lerp(W, strength) for n, W in model.state_dict().items()})


def best_rate(measure: Callable[[float], float], rates: Sequence[float]) -> float:
    """Measure these rates, and on by factors of two until the best lies inside; return it."""
    found, best = {}, None
    while best is None or best in (min(found), max(found)):
        for rate in rates:
            found[rate] = measure(rate)
        best = min(found, key=found.get)
        rates = [rate for rate in (best / 2, best * 2) if rate not in found]
    return best


def main() -> None:
    torch.set_num_threads(1)  # sums in one order
    training, validation, test = load_text("kjv")
    _, _, held_out = load_text("austen_prideandprejudice")

    found: dict = {}

    def note(method: str, rate: float, model, texts: dict) -> float:
        """Measure a model on each text, store the results so far, and return the first."""
        bits = {name: round(bits_per_byte(*model, text), 4) for name, text in texts.items()}
        for name, b in bits.items():
            found.setdefault(method, {}).setdefault(name, {}).setdefault(f"{rate:g}", []).append(b)
        seeds = {"validation": [CHOICE], "test, Austen": RESULT}
        store("language_model_sweep.json", found, time.process_time(), seeds=seeds)
        return next(iter(bits.values()))

    def measure(method: str, rate: float, seed: int, texts: dict) -> float:
        """Train once, measure, and return the first result."""
        model, tokenizer = adapt(method, training, rate, seed)
        result = note(method, rate, (model, tokenizer), texts)
        whole = copy.deepcopy(model.state_dict())
        if WEAKENED.get(method) == rate and seed in RESULT:
            for strength in STRENGTHS:
                model.load_state_dict(whole)
                weaken(model, strength)
                note(f"{method} × {strength}", rate, (model, tokenizer), texts)
        return result

    texts = {"test": test, "Austen": held_out}
    note("base", 0, load(), texts)
    for method in METHODS:
        rates = (2e-3, 4e-3, 8e-3) if method == "full" else (1e-2, 2e-2, 4e-2)
        choice = {"seed": CHOICE, "texts": {"validation": validation}}
        best = best_rate(partial(measure, method, **choice), rates)
        for rate in sorted({best, *FRONTIER.get(method, ())}):
            for seed in RESULT:
                measure(method, rate, seed, texts)
    for rate in CONTROL_RATES:
        for seed in RESULT:
            measure(CONTROL, rate, seed, texts)


if __name__ == "__main__":
    main()
