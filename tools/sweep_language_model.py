"""Where should LoRA sit, and does it forget less? The trainings whose results notebook 7 shows.

python tools/sweep_language_model.py    writes data/language_model_sweep.csv; about 15 CPU minutes

Each training adapts the small language model to the Bible, as notebook 7 does. The seed CHOICE is
measured on validation text alone, and chooses the learning rate of each method. The seeds RESULT
took no part in the choice. They are measured on the Bible's test text, and on Austen.
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
CHOICE, RESULT = 0, (100, 101, 102, 103, 104)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

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


def train(model, tokens: torch.Tensor, rate: float, seed: int) -> None:
    """Train what needs a gradient with Adam, as notebook 7 does; the rate falls to zero."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(tokens) - LENGTH, (STEPS, BATCH, 1), generator=generator)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / STEPS)
        loss = token_bits(model, tokens[places[step] + torch.arange(LENGTH + 1)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def load():
    return AutoModelForCausalLM.from_pretrained(DATA / "language_model").float()


def adapt(method: str, tokens: torch.Tensor, rate: float, seed: int):
    model = load()
    torch.manual_seed(seed)
    if method == CONTROL:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[-2] in ATTENTION + MLP)
    elif METHODS[method]:
        rank, targets = METHODS[method]
        add_lora(model, rank, alpha=rank, targets=targets)
    train(model, tokens, rate, seed)
    return model


def main() -> None:
    torch.set_num_threads(1)  # sums in one order
    bible, austen = read("kjv"), read("austen_prideandprejudice")
    eight, nine = int(0.8 * len(bible)), int(0.9 * len(bible))
    training, validation, test = map(encode, (bible[:eight], bible[eight:nine], bible[nine:]))
    held_out = encode(austen[int(0.9 * len(austen)) :])

    with open(DATA / "language_model_sweep.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("method", "rate", "seed", "text", "bits per byte"))

        def measure(method: str, rate: float, seed: int, texts: dict) -> float:
            """Train once, write one line for each text, and return the first result."""
            model = adapt(method, training, rate, seed)
            bits = {name: bits_per_byte(model, tokens) for name, tokens in texts.items()}
            writer.writerows((method, rate, seed, name, f"{b:.4f}") for name, b in bits.items())
            file.flush()
            return next(iter(bits.values()))

        texts = {"test": test, "Austen": held_out}
        base = load()
        for name, tokens in texts.items():
            writer.writerow(("base", 0, "", name, f"{bits_per_byte(base, tokens):.4f}"))
        for method in METHODS:
            rates = (2e-3, 4e-3, 8e-3) if method == "full" else (1e-2, 2e-2, 4e-2)
            chosen, best = {}, None
            while best is None or best in (min(chosen), max(chosen)):  # until it lies inside
                for rate in rates:
                    chosen[rate] = measure(method, rate, CHOICE, {"validation": validation})
                best = min(chosen, key=chosen.get)
                rates = [rate for rate in (best / 2, best * 2) if rate not in chosen]
            for rate in sorted({best, *FRONTIER.get(method, ())}):
                for seed in RESULT:
                    measure(method, rate, seed, texts)
        for rate in CONTROL_RATES:
            for seed in RESULT:
                measure(CONTROL, rate, seed, texts)


if __name__ == "__main__":
    main()
