"""What do four, three and two bits cost? The trainings whose results notebook 9 shows.

python experiments/sweep_four_bits.py    writes data/four_bits.json; 17 CPU minutes

Each training adapts the small language model to the Bible with LoRA of rank 4 on its seven kinds
of layer, whose weights were rounded first. Seed CHOICE is measured on validation text alone, and
chooses each method's learning rate. The seeds RESULT took no part in the choice. They are measured
on the Bible's test text, and on Austen. The file is written after each training.
"""

import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from experiments.stored import store  # noqa: E402
from experiments.sweep_language_model import best_rate  # noqa: E402
from lora_bits import (  # noqa: E402
    NF4,
    checksum,
    lloyd_max,
    normal_float,
    round_layers,
    start_factors,
)
from lora_tasks import (  # noqa: E402
    ATTENTION,
    MLP,
    bits_per_byte,
    load_language_model,
    load_text,
    train_language_model,
)
from lora_utils import add_lora, lora_layers  # noqa: E402

STEPS, RANK, CHOICE, RESULT = 120, 4, 0, tuple(range(100, 110))
BASES = ("32 bits", "4 bits", "3 bits", "2 bits")
# At 2 bits, also with other starts of the factors than A random and B zero.
STARTS = ("LoftQ", "LoftQ, subtracted", "random, subtracted")
METHODS = [(base, "zero") for base in BASES] + [("2 bits", start) for start in STARTS]
CODES = {"4 bits": NF4} | {f"{n} bits": lloyd_max(normal_float(n)) for n in (3, 2)}


def load(base: str):
    """Return the language model with the seven layers' weights rounded, and its tokenizer."""
    model, tokenizer = load_language_model("language_model", torch.device("cpu"))
    if base in CODES:
        round_layers(model, ATTENTION + MLP, CODES[base])
    return model, tokenizer


def adapt(base: str, start: str, text: str, rate: float, seed: int):
    """Return the rounded model with LoRA trained on the text, and its tokenizer."""
    model, tokenizer = load(base)
    torch.manual_seed(seed)
    add_lora(model, RANK, alpha=RANK, targets=ATTENTION + MLP)
    if start != "zero":
        exact, _ = load("32 bits")
        for name, layer in lora_layers(model).items():
            start_factors(layer, exact.get_submodule(name).weight, start)
    train_language_model(model, tokenizer, text, STEPS, rate, seed)
    return model, tokenizer


def reference() -> dict:
    """Return bitsandbytes' results on the language model's weights: the first, and a checksum."""
    import bitsandbytes
    from bitsandbytes.functional import quantize_4bit

    def theirs(weight: torch.Tensor) -> tuple:
        settings = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": False}
        packed, state = quantize_4bit(weight, **settings)
        packed = packed.flatten()
        values = state.code[torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()]
        scales = state.absmax.repeat_interleave(64)[: weight.numel()]
        # Not their dequantize_4bit, which from 0.49.0 on is wrong on some CPUs, at some shapes.
        return packed, state.absmax, (values[: weight.numel()] * scales).view(weight.shape)

    model, _ = load("32 bits")
    weights = [
        module.weight.detach()
        for name, module in model.named_modules()
        if name.split(".")[-1] in ATTENTION + MLP
    ]
    packed, scales, back = theirs(weights[0])
    first = {"bytes": packed[:8], "scales": scales[:4], "weights": back.flatten()[:4]}
    found = {"version": bitsandbytes.__version__, "checksum": checksum(theirs, weights)}
    return found | {name: numbers.tolist() for name, numbers in first.items()}


def write(found: dict) -> None:
    """Store what was found so far."""
    facts = "bits per byte; those of 'test' and 'Austen' at the rate best on validation"
    store("four_bits.json", found, time.process_time(), numbers=facts, seeds=RESULT)


def main() -> None:
    torch.set_num_threads(1)  # sums in one order
    training, validation, test = load_text("kjv")
    _, _, austen = load_text("austen_prideandprejudice")
    texts = {"test": test, "Austen": austen}
    found: dict = {"bitsandbytes": reference(), "before": {}, "validation": {}}
    found |= {part: {} for part in texts}
    for base in BASES:
        bits = {part: bits_per_byte(*load(base), text) for part, text in texts.items()}
        found["before"][base] = {part: round(b, 4) for part, b in bits.items()}

    def measure(method: tuple[str, str], rate: float) -> float:
        adapted = adapt(*method, training, rate, CHOICE)
        bits = round(bits_per_byte(*adapted, validation), 4)
        found["validation"].setdefault(", ".join(method), {})[f"{rate:g}"] = bits
        write(found)
        return bits

    for method in METHODS:
        name = ", ".join(method)
        rate = best_rate(partial(measure, method), (1e-2, 2e-2, 4e-2))
        for seed in RESULT:
            adapted = adapt(*method, training, rate, seed)
            for part, text in texts.items():
                bits = round(bits_per_byte(*adapted, text), 4)
                found[part].setdefault(name, []).append(bits)
            write(found)
        print(name, rate, found["test"][name], found["Austen"][name], flush=True)


if __name__ == "__main__":
    main()
