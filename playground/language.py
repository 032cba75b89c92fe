"""The language playground: a page that holds the small Llama of notebook 7 and its adapters.

You type; each token is coloured by the bits that the adapters save or lose. What it computes
stands in `llama.js` and `tokenizer.js`, what it shows in `language.html` and `language.js`.
"""

import base64
import json
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn

from lora_utils import CONFIG_FILE, WEIGHTS_FILE

from . import inline, quantise


def write_language_playground(
    path: str | Path, model: nn.Module, tokenizer, adapters: dict[str, Path]
) -> None:
    """Write the page: one HTML file of about 1 MB.

    Args:
        path: the file to write.
        model: the small Llama without LoRA: tied, as many key and value heads as heads.
        tokenizer: its tokenizer, byte-level BPE in the manner of GPT-2.
        adapters: by name, the folders that `save_adapter` or PEFT wrote.
    """
    Path(path).write_text(page(pack(model, tokenizer, adapters)), encoding="utf-8")


def page(stored: bytes) -> str:
    """Return the page that holds what `pack` returned."""
    text = inline("language.html")
    return text.replace("<!-- stored -->", base64.b64encode(stored).decode())


def pack(model: nn.Module, tokenizer, adapters: dict[str, Path]) -> bytes:
    """Return all that the page needs as one file in the safetensors format.

    Its tensors are "base/…", int8 with a scale for each row, and "NAME/…" in 16 bits for each
    adapter; its metadata hold the model's shape, the adapters' settings and the tokenizer.
    """
    tensors = {f"base/{name}": tensor for name, tensor in quantise(model).items()}
    tensors.pop("base/lm_head.weight", None)  # tied: the embedding's numbers
    tensors.pop("base/lm_head.weight_scale", None)
    settings = {}
    for name, folder in adapters.items():
        settings[name] = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
        for key, tensor in safetensors.torch.load_file(Path(folder) / WEIGHTS_FILE).items():
            tensors[f"{name}/{key}"] = tensor.to(torch.float16)
    config = model.config
    shape = {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "epsilon": config.rms_norm_eps,
        "theta": config.rope_parameters["rope_theta"],
    }
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    metadata = {
        "shape": shape,
        "adapters": settings,
        "vocab": bpe["vocab"],
        "merges": bpe["merges"],
    }
    written = {name: json.dumps(value, ensure_ascii=False) for name, value in metadata.items()}
    return safetensors.torch.save(tensors, written)
