"""Where should LoRA sit, and does it forget less? The trainings whose results notebook 7 shows.

python tools/sweep_language_model.py    writes data/language_model_sweep.csv; about 25 CPU minutes

Each training adapts the small language model to the Bible, as notebook 7 does. The seeds in
CHOICE are measured on validation text alone, and choose the learning rate of each method. Those in
RESULT took no part in the choice. They are measured on the Bible's test text, and on Austen.
"""

import csv
import gzip
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from lora_utils import add_lora  # noqa: E402

DATA = ROOT / "data"
STEPS, BATCH, LENGTH, CONTEXT = 120, 8, 64, 128
CHOICE, RESULT = (0, 1), (100, 101, 102, 103, 104)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

# Rank and targets; the first three train exactly as many numbers.
METHODS = {
    "q,v r=18": (18, ["q_proj", "v_proj"]),
    "attention r=9": (9, ATTENTION),
    "MLP r=8": (8, MLP),
    "all r=1": (1, ATTENTION + MLP),
    "all r=4": (4, ATTENTION + MLP),
    "all r=16": (16, ATTENTION + MLP),
    "full": None,
}
LORA_RATES = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
FULL_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
FRONTIER = ("MLP r=8", "all r=4", "full")  # these show their results at every rate


def read(name: str) -> str:
    return gzip.decompress((DATA / "texts" / f"{name}.txt.gz").read_bytes()).decode("ascii")


tokenizer = AutoTokenizer.from_pretrained(DATA / "language_model")


def encode(text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text).input_ids)


def token_bits(model, windows: torch.Tensor) -> torch.Tensor:
    """Return the bits that the model spends on each token but the first of each window."""
    logits = model(windows[:, :-1], use_cache=False).logits
    nats = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return nats / math.log(2)


@torch.no_grad()
def bits_per_byte(model, tokens: torch.Tensor) -> float:
    windows = tokens.unfold(0, CONTEXT + 1, CONTEXT)
    bits = sum(token_bits(model, part).sum().item() for part in windows.split(16))
    return bits / len(tokenizer.decode(windows[:, 1:].flatten()).encode())


def train(model, tokens: torch.Tensor, rate: float) -> None:
    """Train what needs a gradient with Adam; the rate falls linearly to zero."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / STEPS)
        starts = torch.randint(len(tokens) - LENGTH, (BATCH, 1))
        loss = token_bits(model, tokens[starts + torch.arange(LENGTH + 1)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def adapt(method: str, tokens: torch.Tensor, rate: float, seed: int):
    model = AutoModelForCausalLM.from_pretrained(DATA / "language_model").float()
    torch.manual_seed(seed)
    if METHODS[method]:
        rank, targets = METHODS[method]
        add_lora(model, rank, alpha=rank, targets=targets)
    train(model, tokens, rate)
    return model


def main() -> None:
    torch.set_num_threads(1)  # sums in one order
    bible, austen = read("kjv"), read("austen_prideandprejudice")
    eight, nine = int(0.8 * len(bible)), int(0.9 * len(bible))
    training, validation, test = map(encode, (bible[:eight], bible[eight:nine], bible[nine:]))
    held_out = encode(austen[int(0.9 * len(austen)) :])

    rows = []
    for method in METHODS:
        rates = LORA_RATES if METHODS[method] else FULL_RATES
        chosen = {}
        for rate in rates:
            for seed in CHOICE:
                bits = bits_per_byte(adapt(method, training, rate, seed), validation)
                rows.append((method, rate, seed, "Bible, validation", f"{bits:.4f}"))
                chosen[rate] = chosen.get(rate, 0) + bits
        best = min(chosen, key=chosen.get)
        for rate in rates if method in FRONTIER else [best]:
            for seed in RESULT if rate == best else RESULT[:3]:
                model = adapt(method, training, rate, seed)
                for text, tokens in (("Bible, test", test), ("Austen", held_out)):
                    bits = bits_per_byte(model, tokens)
                    rows.append((method, rate, seed, text, f"{bits:.4f}"))
        print(method, best, rows[-2:], flush=True)

    with open(DATA / "language_model_sweep.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("method", "rate", "seed", "text", "bits per byte"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
