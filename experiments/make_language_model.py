"""Make the small language model of notebook 7, a Llama that has read Jane Austen.

python experiments/make_language_model.py               writes data/language_model: 10 CPU minutes
python experiments/make_language_model.py FOLDER STEPS  writes FOLDER, after STEPS steps

The folder looks like one from the Hugging Face Hub: config.json, model.safetensors in 16 bits, a
tokenizer, and a README.md that records this very run. The model, 623,488 numbers, reads Austen's
six novels but for the last tenth of "Pride and Prejudice", on which it is measured. The same
processor, libraries and texts give the same bytes; other processors round differently.
"""

import gzip
import hashlib
import math
import sys
import time
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).resolve().parents[1]))
from lora_tasks import DATA, bits_per_byte  # noqa: E402

HELD_OUT = "austen_prideandprejudice"  # its last tenth
VOCABULARY, BATCH, CONTEXT, STEPS, SEED = 1024, 16, 128, 2000, 0
END = "<|endoftext|>"


def read_austen() -> tuple[str, str]:
    """Return what the model reads, and what is held out."""
    texts = []
    for path in sorted((DATA / "texts").glob("austen_*.txt.gz")):
        text = gzip.decompress(path.read_bytes()).decode("ascii")
        if path.name.startswith(HELD_OUT):
            cut = int(0.9 * len(text))
            text, held_out = text[:cut], text[cut:]
        texts.append(text)
    return "".join(texts), held_out


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, the kind of GPT-2: it can spell any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
    )


def make_model() -> LlamaForCausalLM:
    """Return a Llama with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # six layers add to one stream: each starts small
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.normal_(linear.weight, std=0.02 / math.sqrt(6))
    return model


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with all its singular values near 1, by five Newton–Schulz steps.

    torch.optim.Muon does the same in bfloat16, which took 20 times as long on a CPU.
    """
    x = matrix / (matrix.norm() + 1e-7)
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def train(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int) -> float:
    """Train in place; return the mean loss of the last 50 steps, in nats per token.

    The matrices inside the layers take Muon's steps (K. Jordan, 2024): momentum, orthogonalized.
    The embedding and the norms take AdamW's. Both rates rise for 40 steps, then fall to zero.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "layers" in name]
    others = [p for name, p in named if not (p.ndim == 2 and "layers" in name)]
    adamw = torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0)
    momenta = [torch.zeros_like(p) for p in matrices]
    losses = []
    for step in range(steps):
        pace = min(1, (step + 1) / 40) * (1 - step / steps)
        adamw.param_groups[0]["lr"] = 4e-3 * pace
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1))
        window = tokens[starts + torch.arange(CONTEXT + 1)]
        logits = model(window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        adamw.step()
        with torch.no_grad():
            for weight, momentum in zip(matrices, momenta, strict=True):
                momentum.mul_(0.95).add_(weight.grad)
                update = orthogonalize(weight.grad + 0.95 * momentum)
                tall = max(1, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.sub_(update, alpha=0.02 * pace * tall)
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1}: {loss.item():.3f} nats per token", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def main(folder: str = str(DATA / "language_model"), steps: str = str(STEPS)) -> None:
    """Make tokenizer and model, write the folder, and record the run in its README.md."""
    torch.set_num_threads(1)  # sums in one order
    torch.manual_seed(SEED)
    text, held_out = read_austen()
    tokenizer = make_tokenizer(text)
    model = make_model()
    start = time.process_time()
    loss = train(model, torch.tensor(tokenizer(text).input_ids), int(steps))
    seconds = time.process_time() - start

    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = Path(folder, "tokenizer_config.json")  # with the name that transformers 4 knows
    written = settings.read_text(encoding="utf-8")
    settings.write_text(written.replace("TokenizersBackend", "PreTrainedTokenizerFast"), "utf-8")
    weights = Path(folder, "model.safetensors")
    weights.chmod(0o644)  # safetensors writes it for the owner alone
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    bits = bits_per_byte(model.float(), tokenizer, held_out)
    versions = ", ".join(library.__version__ for library in (torch, transformers, tokenizers))
    card = f"""\
# A small Llama that has read Jane Austen

{model.num_parameters():,} numbers, made for notebook 7 by `experiments/make_language_model.py`.
That script wrote this page, too.

| this run | |
|---|---|
| steps of {BATCH} × {CONTEXT} tokens | {int(steps):,} |
| CPU seconds, one thread | {seconds:,.0f} |
| loss, mean of the last 50 steps | {loss:.3f} nats per token |
| held-out Austen, with these 16-bit weights | {bits:.3f} bits per byte |
| torch, transformers, tokenizers | {versions} |
| SHA-256 of `model.safetensors` | `{checksum}` |

The tokenizer is made from the same texts, Austen's six novels in `data/texts`. The last tenth of
*Pride and Prejudice* is held out from both. Licence: that of the repository (MIT).
"""
    Path(folder, "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main(*sys.argv[1:])
