"""Make what the site's language playground holds: the small Llama, the Bible, and Shakespeare.

python experiments/make_language_playground.py    writes data/language_playground.safetensors

Each adapter is trained as in notebook 7: rank 4 on all seven layers, 120 steps. Less than a
CPU minute for both.
"""

import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from lora_tasks import (  # noqa: E402
    ATTENTION,
    DATA,
    MLP,
    bits_per_byte,
    load_language_model,
    load_text,
    train_language_model,
)
from lora_utils import add_lora, save_adapter  # noqa: E402
from playground.language import pack  # noqa: E402

TEXTS = {"Bible": "kjv", "Shakespeare": "as_you_like_it"}
RANK, STEPS, RATE, SEED = 4, 120, 2e-2, 100


def main() -> None:
    torch.set_num_threads(1)
    base, tokenizer = load_language_model("language_model", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        adapters = {name: Path(folder, name) for name in TEXTS}
        for name, text in TEXTS.items():
            training, _, test = load_text(text)
            model, _ = load_language_model("language_model", torch.device("cpu"))
            before = bits_per_byte(model, tokenizer, test[:40_000])
            torch.manual_seed(SEED)
            add_lora(model, RANK, RANK, ATTENTION + MLP)
            train_language_model(model, tokenizer, training, STEPS, RATE, SEED)
            after = bits_per_byte(model, tokenizer, test[:40_000])
            print(f"{name}: from {before:.3f} to {after:.3f} bits per byte")
            save_adapter(model, adapters[name])
        stored = pack(base, tokenizer, adapters)
    (DATA / "language_playground.safetensors").write_bytes(stored)
    print(f"{len(stored):,} bytes")


if __name__ == "__main__":
    main()
