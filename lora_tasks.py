"""What there is to adapt: digits and a classifier of them, a language model and its texts."""

import gzip
import logging
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DATA = Path(__file__).resolve().parent / "data"

# peft and transformers load bitsandbytes, if it is there. On some processors it then warns of a
# missing package that nothing here needs. Import this module before them.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def pick_device() -> torch.device:
    """Return the fastest device at hand: an NVIDIA or AMD GPU, an Apple GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


# --- Training -----------------------------------------------------------------------------------


def train(
    model: nn.Module, loss_of: Callable[[int], torch.Tensor], steps: int, lr: float
) -> list[float]:
    """Use Adam to train, in place, each parameter that needs a gradient.

    `loss_of(step)` computes the loss of a step. The learning rate falls linearly from `lr` to zero,
    so that the result does not depend on the last few batches. A batch norm whose weight does not
    learn keeps its statistics, too, so that the base without LoRA is still the base. Returns the
    loss of each step, before its update, and leaves the model in evaluation mode.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable or steps < 1:
        raise ValueError(f"nothing to train: {len(trainable)} trainable tensors, {steps} steps")
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(module.weight is not None and module.weight.requires_grad)
    optimizer = torch.optim.Adam(trainable, lr=lr, fused=True)  # the same step, in one call
    losses = []
    for step in tqdm(range(steps), leave=False):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())  # .item() would wait for the GPU in each step
    model.eval()
    return torch.stack(losses).tolist()


# --- What a training step holds (notebook 6) ----------------------------------------------------


def byte_count(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes that the tensors' memory takes; what they share counts once.

    Not for tensors on the meta device: they have no memory.
    """
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the tensors that autograd keeps for the backward pass in a `with` block.

    Each piece of memory counts once, and the model's own parameters and buffers do not.
    """
    seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in seen:
            seen.add(address)
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def peak_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the most bytes that the model and all tensors made by `run()` hold at once."""
    own = [*model.parameters(), *model.buffers()]
    with _Alive(own) as alive:
        run()
    return byte_count(own) + alive.peak


class _Alive(TorchDispatchMode):
    """Counts the bytes of all tensors alive at once: it sees what each operation returns."""

    def __init__(self, own: list[torch.Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.now = self.peak = 0

    def free(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.data_ptr() not in self.known:
                self.known.add(storage.data_ptr())  # counted until its last tensor is gone
                weakref.finalize(storage, self.free, storage.data_ptr(), storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result


# --- MNIST and RichBoyNet (notebook 3) ----------------------------------------------------------

MEAN, STD = 0.1307, 0.3081  # of the training pixels, between 0 and 1


class Digits(NamedTuple):
    """Handwritten digits: images (N × 28 × 28, standardised floats) and labels (N, 0 to 9)."""

    images: torch.Tensor
    labels: torch.Tensor


def load_mnist(device: torch.device) -> tuple[Digits, Digits, Digits]:
    """Return 50,000 digits to train on, 10,000 for validation and 10,000 to test on.

    The first two are MNIST's training set. All are tensors on the device. torchvision unpacks
    copies of the archives in `data/`; one that is missing or damaged it downloads.
    """
    from torchvision.datasets import MNIST  # takes a second to import, and only this needs it

    parts = []
    with tempfile.TemporaryDirectory() as folder:  # `data/` may be read-only, or others unpack, too
        raw = Path(folder, "MNIST", "raw")
        raw.mkdir(parents=True)
        for archive in (DATA / "MNIST" / "raw").glob("*.gz"):
            shutil.copyfile(archive, raw / archive.name)
        for train_part in (True, False):
            part = MNIST(folder, train=train_part, download=True)
            images = part.data.to(device, torch.float32)
            images.div_(255).sub_(MEAN).div_(STD)  # in place: the training images take 188 MB
            parts.append(Digits(images, part.targets.to(device)))
    known, test = parts
    return subset(known, slice(50_000)), subset(known, slice(50_000, None)), test


def subset(digits: Digits, chosen: slice | torch.Tensor) -> Digits:
    """Return some of the digits: a slice, a mask of booleans (N), or indices."""
    return Digits(digits.images[chosen], digits.labels[chosen])


def rotate(digits: Digits) -> Digits:
    """Return the digits turned clockwise by a quarter turn: the new task of later notebooks."""
    return Digits(digits.images.rot90(-1, dims=(1, 2)).contiguous(), digits.labels)


class RichBoyNet(nn.Module):
    """A deliberately oversized classifier of digits: 784 → 1000 → 2000 → 10, with ReLU."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 1000)
        self.fc2 = nn.Linear(1000, 2000)
        self.fc3 = nn.Linear(2000, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (N × 10) for images (N × 28 × 28)."""
        hidden = torch.relu(self.fc1(images.flatten(1)))
        hidden = torch.relu(self.fc2(hidden))
        return self.fc3(hidden)


def train_classifier(
    model: nn.Module, data: Digits, batches: int, batch_size: int, lr: float = 1e-3
) -> list[float]:
    """Train by cross-entropy on shuffled mini-batches, in place, and return the losses.

    Every example is drawn once before any is drawn again.
    """
    count, device = len(data.labels), data.labels.device
    if not (count and batches > 0 and batch_size > 0):
        raise ValueError(
            f"nothing to train on: {count} examples, {batches} batches of {batch_size}"
        )
    epochs = math.ceil(batches * batch_size / count)
    order = torch.cat([torch.randperm(count, device=device) for _ in range(epochs)])
    chosen = order[: batches * batch_size].view(batches, batch_size)

    def loss_of(step: int) -> torch.Tensor:
        batch = chosen[step]
        return F.cross_entropy(model(data.images[batch]), data.labels[batch])

    return train(model, loss_of, batches, lr)


def pretrained_richboynet(device: torch.device) -> RichBoyNet:
    """Return the base that notebook 3 trains and notebooks 4 and 5 share, from `data/`."""
    model = RichBoyNet()
    safetensors.torch.load_model(model, DATA / "richboynet.safetensors")
    return model.to(device)


@torch.no_grad()
def errors_per_digit(model: nn.Module, data: Digits) -> torch.Tensor:
    """Count the wrong answers for each true digit: a tensor of 10 whole numbers, on the CPU."""
    model.eval()
    wrong = model(data.images).argmax(dim=1) != data.labels
    return torch.bincount(data.labels[wrong], minlength=10).cpu()


def count_errors(model: nn.Module, data: Digits) -> int:
    """Count the wrong answers for all digits together."""
    return int(errors_per_digit(model, data).sum())


# --- A language model (notebook 7) --------------------------------------------------------------

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def load_language_model(
    name: str, device: torch.device
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Return a model in float32 and its tokenizer, from a folder in `data/` or from the Hub.

    Raises:
        OSError: there is no such model, or it cannot be loaded.
        ValueError: LoRA in the layers named in ATTENTION and MLP would not reach all of it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds to import
    from transformers.utils import logging

    logging.disable_progress_bar()
    here = (DATA / name).is_dir()
    source = DATA / name if here else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source).float()
    except Exception as error:  # many kinds, of three libraries
        trouble = "is damaged" if here else "is no folder in data/, nor to be had from the Hub"
        raise OSError(f"{str(source)!r} {trouble}: {error}") from error
    advice = "take a dense Llama, Mistral, Qwen or Gemma"
    if experts := [n for n, parameter in model.named_parameters() if parameter.ndim > 2]:
        raise ValueError(f"{name!r} has weights in no linear layer, as {experts[0]}: {advice}")
    linear = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if missing := set(ATTENTION + MLP) - linear:
        raise ValueError(f"{name!r} has no linear layers {sorted(missing)}: {advice}")
    return model.to(device).eval(), tokenizer


def load_text(name: str) -> tuple[str, str, str]:
    """Return a text of `data/texts`: 80 % to train on, 10 % for validation, 10 % to test on."""
    text = gzip.decompress((DATA / "texts" / f"{name}.txt.gz").read_bytes()).decode("ascii")
    eight, nine = int(0.8 * len(text)), int(0.9 * len(text))
    return text[:eight], text[eight:nine], text[nine:]


def encode(
    tokenizer: "PreTrainedTokenizerBase", text: str, device: torch.device, least: int = 0
) -> torch.Tensor:
    """Return the numbers of a text's tokens, without a token that marks its start.

    A text with fewer than `least` tokens is refused with a ValueError.
    """
    numbers = tokenizer(text, add_special_tokens=False).input_ids
    tokens = torch.tensor(numbers, dtype=torch.long, device=device)
    if len(tokens) < least:
        raise ValueError(f"the text is too short: {len(tokens)} tokens, {least} are needed")
    return tokens


def token_bits(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", windows: torch.Tensor
) -> torch.Tensor:
    """Return the bits of each token but the first of each window (windows × (tokens - 1))."""
    # The token with which some models start a text; the small one has none.
    opening = torch.tensor([tokenizer("").input_ids], dtype=torch.long, device=windows.device)
    inputs = torch.cat([opening.expand(len(windows), -1), windows[:, :-1]], dim=1)
    logits = model(inputs, use_cache=False).logits[:, opening.shape[1] :]
    nats = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return nats.view(len(windows), -1) / math.log(2)


@torch.no_grad()
def bits_per_byte(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", text: str
) -> float:
    """Return the model's bits per byte, with at most 128 tokens to look back on.

    Only whole windows of 128 tokens are measured: the text must have 129 tokens or more, and up to
    127 at its end do not count.
    """
    windows = encode(tokenizer, text, model.device, least=129).unfold(0, 129, 128)
    bits = sum(token_bits(model, tokenizer, part).sum().item() for part in windows.split(16))
    read = tokenizer.decode(windows[:, 1:].flatten(), clean_up_tokenization_spaces=False)
    return bits / len(read.encode())


def train_language_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    steps: int,
    lr: float,
    seed: int,
) -> list[float]:
    """Train to predict each next token, in place, and return the losses, in bits per token.

    A step takes 8 pieces of 65 tokens from anywhere in the text.
    """
    tokens = encode(tokenizer, text, model.device, least=65)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(tokens) - 64, (steps, 8, 1), generator=generator)
    pieces = places.to(tokens.device) + torch.arange(65, device=tokens.device)

    def loss_of(step: int) -> torch.Tensor:
        return token_bits(model, tokenizer, tokens[pieces[step]]).mean()

    return train(model, loss_of, steps, lr)
