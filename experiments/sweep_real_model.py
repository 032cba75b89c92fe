"""What matters when a chat model learns a query language? The results that notebook 8 shows.

python experiments/sweep_real_model.py            writes data/real_model.json, or goes on with it
python experiments/sweep_real_model.py SECONDS    begins nothing new after so many CPU seconds

The seed CHOICE chooses each method's rate, by the loss on the answers of validation questions. The
seeds RESULTS took no part in that: each has training pairs, batches and 40 test questions of its
own, on tables that training never sees. Under one seed all methods see the same batches. The
notebook's own training, r = 8, is tried on all five seeds, what it is compared with on the first
three.
"""

import copy
import functools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from experiments.stored import DATA, store  # noqa: E402
from lora_chat import (  # noqa: E402
    CHAT_MODEL,
    DESCRIPTION,
    KNOWN_TABLES,
    SYSTEM,
    UNKNOWN_TABLES,
    answer,
    answer_loss,
    chat_prompt,
    draw_batches,
    load_chat_model,
    make_batch,
    make_pairs,
    train_on_batches,
)
from lora_tasks import ATTENTION, MLP  # noqa: E402
from lora_utils import add_lora  # noqa: E402

NAME = "real_model.json"
STEPS, SIZE = 32, 4  # pairs a step
CHOICE, RESULTS = 0, (111, 112, 113, 114, 115)
LINEAR = ATTENTION + MLP
# Rank, targets and rates to try; α is twice the rank; full: all weights, no LoRA.
METHODS = {
    "r = 8": (8, LINEAR, (1e-3, 2e-3, 4e-3, 8e-3)),
    "r = 1": (1, LINEAR, (4e-3, 8e-3, 1.6e-2)),
    "q, v": (8, ["q_proj", "v_proj"], (2e-3, 4e-3, 8e-3, 1.6e-2)),
    "full": (None, None, (1e-4, 2e-4, 4e-4)),
}
COUNTS = (16, 32, 8)  # of different examples; 128 draws in any case
TABLES = (3,)  # to train on, in place of all twelve
LABELS = ("whole text", "no end token", "padding")  # r = 8 with labels as nobody wants them

PROMPTS = {  # what is said before the question, and how many examples
    "the question alone": (False, 0),
    "the language described": (True, 0),
    "4 examples": (False, 4),
    "described, 16 examples": (True, 16),
}


def training_pairs(seed: int, count: int = 2000, tables: int = 12) -> list:
    return make_pairs(count, dict(list(KNOWN_TABLES.items())[:tables]), 1000 + seed)


def test_pairs(seed: int, count: int = 40) -> list:
    return make_pairs(count, UNKNOWN_TABLES, 2000 + seed)


def relabel(batch: dict, how: str | None) -> dict:
    """Return the batch with other labels."""
    tokens, labels = batch["input_ids"], batch["labels"].clone()
    if how == "whole text":
        labels = tokens.masked_fill(batch["attention_mask"] == 0, -100)
    elif how == "no end token":
        labels[:, -1] = -100
    elif how == "padding":
        labels = labels.where(batch["attention_mask"] == 1, tokens)
    return batch | {"labels": labels}


@functools.cache
def base() -> tuple:
    return load_chat_model()


def adapt(method: str, rate: float, seed: int, labels: str | None = None, **examples: int):
    """Return the model, trained, and its tokenizer."""
    model, tokenizer = copy.deepcopy(base()[0]), base()[1]
    torch.manual_seed(seed)
    rank, targets, _ = METHODS[method]
    if rank:
        add_lora(model, rank, 2 * rank, targets)
    batches = draw_batches(tokenizer, training_pairs(seed, **examples), STEPS, SIZE, seed)
    train_on_batches(model, [relabel(batch, labels) for batch in batches], rate)
    return model, tokenizer


def adapt_with_trl(rate: float, seed: int):
    """Return the model that TRL and PEFT train on the pairs that r = 8 sees, and its tokenizer."""
    from datasets import Dataset

    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = copy.deepcopy(base()[0]), base()[1]
    rng = random.Random(seed)  # as draw_batches does
    rows = []
    for question, query in rng.sample(training_pairs(seed), 2000)[: STEPS * SIZE]:
        prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        completion = [{"role": "assistant", "content": query}]
        rows.append({"prompt": prompt, "completion": completion})
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=SIZE,
            learning_rate=rate,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=seed,
            save_strategy="no",
            report_to="none",
        )
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        )
        trainer.train()
    return trainer.model.eval(), tokenizer


def measure(model, tokenizer, pairs: list, **prompt) -> dict:
    """Return the share of exact matches, and what an answer costs in tokens and CPU seconds."""
    prompts = [chat_prompt(tokenizer, question, **prompt) for question, _ in pairs]
    start = time.process_time()
    written = answer(model, tokenizer, prompts)
    seconds = (time.process_time() - start) / len(pairs)
    right = sum(text == query for text, (_, query) in zip(written, pairs, strict=True))
    tokens = sum(len(tokenizer(prompt).input_ids) for prompt in prompts) / len(pairs)
    wrong = [[q, w] for w, (_, q) in zip(written, pairs, strict=True) if w != q]
    stopped = sum(text.count(";") == 1 and text.endswith(";") for text in written)
    return {
        "right": round(right / len(pairs), 4),
        "stopped": round(stopped / len(pairs), 4),
        "tokens": round(tokens),
        "seconds": round(seconds, 2),
        "wrong": wrong[:6],  # what was wanted, what was written
    }


def validation_loss(model, tokenizer) -> dict:
    pairs = make_pairs(40, UNKNOWN_TABLES, 3000)
    with torch.no_grad():
        return {"loss": round(answer_loss(model, make_batch(tokenizer, pairs)).item(), 4)}


def best_rate(found: dict, method: str) -> float:
    rates = METHODS[method][2]
    losses = {rate: found[f"choice / {method} / {rate:g}"]["loss"] for rate in rates}
    return min(losses, key=losses.get)


def jobs(found: dict):
    """Yield the name of each measurement, and the function that makes it, in order of worth."""

    def choose(method):
        rates = METHODS[method][2]
        for rate in rates:
            yield (
                f"choice / {method} / {rate:g}",
                lambda rate=rate: validation_loss(*adapt(method, rate, CHOICE)),
            )

    def result(name, method, seeds, **change):
        rate = best_rate(found, method)
        for seed in seeds:
            yield (
                f"result / {name} / {seed}",
                lambda seed=seed: measure(*adapt(method, rate, seed, **change), test_pairs(seed)),
            )

    def prompting(name, count):
        described, examples = PROMPTS[name]
        system = {"system": DESCRIPTION} if described else {}
        for seed in RESULTS[:count]:
            shown = training_pairs(seed, examples)
            yield (
                f"prompt / {name} / {seed}",
                lambda seed=seed, shown=shown: measure(
                    *base(), test_pairs(seed, 8), examples=shown, **system
                ),
            )

    yield from choose("r = 8")
    yield from result("r = 8", "r = 8", RESULTS)
    for name in PROMPTS:
        yield from prompting(name, 1)
    for count in COUNTS:
        yield from result(f"{count} examples", "r = 8", RESULTS[:3], count=count)
    for tables in TABLES:
        yield from result(f"{tables} tables", "r = 8", RESULTS[:3], tables=tables)
    for method in ("r = 1", "full", "q, v"):
        yield from choose(method)
        yield from result(method, method, RESULTS[:3])
    rate = best_rate(found, "r = 8")
    for seed in RESULTS[:3]:
        yield (
            f"result / TRL and PEFT / {seed}",
            lambda seed=seed: measure(*adapt_with_trl(rate, seed), test_pairs(seed)),
        )
    for labels in LABELS:
        yield from result(labels, "r = 8", RESULTS[:1], labels=labels)


def main(most: float) -> None:
    torch.set_num_threads(1)  # sums in one order
    found, before = {}, 0
    if (DATA / NAME).exists():
        stored = json.loads((DATA / NAME).read_text(encoding="utf-8"))
        found, before = stored["results"], stored["made"]["seconds"]
    for name, make in jobs(found):
        if name in found:
            continue
        if time.process_time() > most:
            return print("to be gone on with at", name)
        found[name] = make()
        print(name, found[name], flush=True)
        facts = {"model": CHAT_MODEL, "steps": STEPS, "pairs a step": SIZE}
        store(NAME, found, before + time.process_time(), **facts)
    print("all is done")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else float("inf"))
