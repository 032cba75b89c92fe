"""Measure the bytes of real training steps, to check the site's calculator by.

python experiments/measured_bytes.py    writes data/measured_bytes.json; some 5 CPU minutes

The model has the shape of SmolLM2-135M and random weights; a step is Hugging Face's: forward with
labels, backward, Adam. Measured are the bytes that autograd keeps after the forward pass, and the
most bytes that are alive at once, weights included. `tests/browser/test_tools.py` compares.
"""

import gc
import json
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from stored import store  # noqa: E402

from lora_tasks import ATTENTION, MLP, byte_count, kept_for_backward, peak_bytes  # noqa: E402
from lora_utils import add_lora  # noqa: E402

SHAPE = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}
TARGETS = {"query and value": ["q_proj", "v_proj"], "all linear layers": ATTENTION + MLP}
RANK = 8


def build(dtype: torch.dtype, targets: list[str] | None, attention: str, **changes: int):
    """Return the model, with LoRA on these layers, or to be trained in full."""
    config = LlamaConfig(**(SHAPE | changes), attn_implementation=attention, use_cache=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    if targets:
        add_lora(model, RANK, RANK, targets)
    return model.train()


def measure(model, batch: int, tokens: int, checkpointing: bool) -> dict[str, int]:
    """Return the bytes of the weights, of what is kept, and of the peak of a step."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(model.config.vocab_size, (batch, tokens))
    with kept_for_backward(model) as kept:
        loss = model(input_ids=ids, labels=ids).loss
    bytes_kept = byte_count(kept)
    del loss, kept

    def step():
        model(input_ids=ids, labels=ids).loss.backward()

    peak = peak_bytes(model, step)
    for parameter in model.parameters():
        parameter.grad = None
    return {"weights": byte_count(model.parameters()), "kept": bytes_kept, "peak": peak}


def settings():
    """The steps: (precision, way, attention, checkpointing, batch, tokens, vocabulary)."""
    everywhere = "all linear layers"
    for precision, most in (("float32", 512), ("bfloat16", 128)):  # 16 bits are slow on a CPU
        half, few = most // 2, most // 4
        yield precision, everywhere, "sdpa", True, 1, most, 64  # a small vocabulary:
        yield precision, everywhere, "sdpa", False, 1, half, 64  # the blocks decide
        yield precision, "query and value", "sdpa", False, 1, half, 64
        yield precision, "in full", "sdpa", False, 1, half, 64
        yield precision, everywhere, "eager", False, 1, half, 64
        yield precision, everywhere, "sdpa", True, 1, few, 49_152
        yield precision, everywhere, "sdpa", True, 2, few, 49_152
        yield precision, everywhere, "sdpa", False, 1, few, 49_152
        yield precision, "in full", "sdpa", True, 1, few, 49_152


def main() -> None:
    path = ROOT / "data" / "measured_bytes.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    results = stored["results"] if stored else []  # of a run that was cut off
    start = time.process_time() - (stored["made"]["seconds"] if stored else 0)
    names = ("precision", "way", "attention", "checkpointing", "batch", "tokens", "vocabulary")
    for setting in settings():
        described = dict(zip(names, setting, strict=True))
        if any(described.items() <= row.items() for row in results):
            continue
        precision, way, attention, checkpointing, batch, tokens, vocabulary = setting
        targets = TARGETS.get(way)
        model = build(getattr(torch, precision), targets, attention, vocab_size=vocabulary)
        results.append(described | measure(model, batch, tokens, checkpointing))
        print(results[-1], flush=True)
        store("measured_bytes.json", results, time.process_time() - start, shape=SHAPE, rank=RANK)
        del model
        gc.collect()


if __name__ == "__main__":
    main()
