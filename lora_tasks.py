"""What there is to adapt: digits and a classifier of them, a language model and its texts."""

import gzip
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from filelock import FileLock
from tqdm import tqdm

# --- Where to compute ---------------------------------------------------------------------------


def pick_device() -> torch.device:
    """Return the fastest device at hand: an NVIDIA or AMD GPU, an Apple GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


# --- MNIST and RichBoyNet (notebook 3) ----------------------------------------------------------

DATA = Path(__file__).resolve().parent / "data"


class Digits(NamedTuple):
    """Handwritten digits: images (N × 28 × 28, standardised floats) and labels (N, 0 to 9)."""

    images: torch.Tensor
    labels: torch.Tensor


def load_mnist(device: torch.device) -> tuple[Digits, Digits, Digits]:
    """Return 50,000 digits to train on, 10,000 to choose settings by, 10,000 to test on.

    The first two are MNIST's training set. All are tensors on the device. The first call unpacks
    the archives in `data/`, or downloads them where they are missing.

    Raises:
        RuntimeError: the files cannot be read, written or downloaded.
    """
    from torchvision.datasets import MNIST  # takes a second to import, and only this needs it

    try:
        with FileLock(DATA / "MNIST.lock"):  # two notebooks must not unpack at the same time
            parts = [MNIST(DATA, train=train, download=True) for train in (True, False)]
    except OSError as error:  # a folder that cannot be written, a full disk
        raise RuntimeError(f"MNIST cannot be unpacked in {DATA}: {error}") from error
    except Exception as error:
        advice = f"delete the files without .gz in {DATA / 'MNIST' / 'raw'} and run again"
        raise RuntimeError(f"MNIST is damaged or missing ({error}): {advice}") from error
    # 0.1307 and 0.3081 are the mean and the standard deviation of the training pixels.
    train, test = (
        Digits(  # each step in place: the training images take 188 MB
            part.data.to(device, torch.float32).div_(255).sub_(0.1307).div_(0.3081),
            part.targets.to(device),
        )
        for part in parts
    )
    return subset(train, slice(50_000)), subset(train, slice(50_000, None)), test


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
    """Train with Adam and cross-entropy on shuffled mini-batches, in place.

    Only parameters with `requires_grad` are trained. Every example is drawn once before any is
    drawn again. The learning rate falls linearly from `lr` to zero, so that the result does not
    depend on the last few batches.

    Returns:
        The loss of each batch, before the step it causes.

    Raises:
        ValueError: there are no data, no batches, or nothing to train.
    """
    count, device = len(data.labels), data.labels.device
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not (count and trainable and batches > 0 and batch_size > 0):
        raise ValueError(
            f"nothing to train: {len(trainable)} trainable tensors, {count} examples, "
            f"{batches} batches of {batch_size}"
        )
    optimizer = torch.optim.Adam(trainable, lr=lr, fused=True)  # the same step, in one call
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / batches)
    epochs = math.ceil(batches * batch_size / count)
    order = torch.cat([torch.randperm(count, device=device) for _ in range(epochs)])
    losses = []
    with _mode(model, training=True):
        for batch in tqdm(order[: batches * batch_size].view(batches, batch_size), leave=False):
            loss = F.cross_entropy(model(data.images[batch]), data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())  # .item() would wait for the GPU in each step
    return torch.stack(losses).tolist()


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model into training or evaluation mode inside a `with` block."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def pretrained_richboynet(device: torch.device) -> RichBoyNet:
    """Return the base that notebook 3 trains and notebooks 4 and 5 share, from `data/`."""
    model = RichBoyNet()
    safetensors.torch.load_model(model, DATA / "richboynet.safetensors")
    return model.to(device)


@torch.no_grad()
def errors_per_digit(model: nn.Module, data: Digits) -> torch.Tensor:
    """Count the wrong answers for each true digit: a tensor of 10 whole numbers, on the CPU."""
    with _mode(model, training=False):
        wrong = model(data.images).argmax(dim=1) != data.labels
    return torch.bincount(data.labels[wrong], minlength=10).cpu()


def count_errors(model: nn.Module, data: Digits) -> int:
    """Count the wrong answers for all digits together."""
    return int(errors_per_digit(model, data).sum())


# --- A language model (notebook 7) --------------------------------------------------------------

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def load_language_model(name: str, device: torch.device) -> tuple[nn.Module, Callable]:
    """Return a model in float32 and its tokenizer, from a folder in `data/` or from the Hub.

    Raises:
        OSError: there is no such model.
        ValueError: its linear layers do not have the seven names in ATTENTION and MLP.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds to import
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = DATA / name if (DATA / name).is_dir() else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source).float()
    except OSError as error:
        raise OSError(f"{name!r} is no folder in data/, and cannot be had from the Hub") from error
    linear = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if missing := set(ATTENTION + MLP) - linear:
        advice = "take a Llama, Mistral, Qwen or Gemma"
        raise ValueError(f"{name!r} has no linear layers {sorted(missing)}: {advice}")
    return model.to(device).eval(), tokenizer


def load_text(name: str) -> tuple[str, str, str]:
    """Return a text of `data/texts`: 80 % to train on, 10 % to choose settings by, 10 % to test."""
    text = gzip.decompress((DATA / "texts" / f"{name}.txt.gz").read_bytes()).decode("ascii")
    eight, nine = int(0.8 * len(text)), int(0.9 * len(text))
    return text[:eight], text[eight:nine], text[nine:]


def encode(tokenizer: Callable, text: str, device: torch.device) -> torch.Tensor:
    """Return the numbers of a text's tokens, without a token that would mark its start."""
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, device=device)


def token_bits(model: nn.Module, tokenizer: Callable, windows: torch.Tensor) -> torch.Tensor:
    """Return the bits of each token but the first in each window (windows × tokens)."""
    # The token with which some models start a text; the small one has none.
    opening = torch.tensor([tokenizer("").input_ids], dtype=torch.long, device=windows.device)
    inputs = torch.cat([opening.expand(len(windows), -1), windows[:, :-1]], dim=1)
    logits = model(inputs, use_cache=False).logits[:, opening.shape[1] :]
    nats = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return nats.view(len(windows), -1) / math.log(2)


@torch.no_grad()
def bits_per_byte(model: nn.Module, tokenizer: Callable, text: str) -> float:
    """Return the model's bits per byte, with at most 128 tokens to look back on."""
    windows = encode(tokenizer, text, model.device).unfold(0, 129, 128)
    bits = sum(token_bits(model, tokenizer, part).sum().item() for part in windows.split(16))
    return bits / len(tokenizer.decode(windows[:, 1:].flatten()).encode())


def train_language_model(
    model: nn.Module,
    tokenizer: Callable,
    text: str,
    steps: int,
    rate: float,
    seed: int,
    start: int = 0,
    stop: int | None = None,
    state: dict | None = None,
) -> dict:
    """Train what needs a gradient with Adam, in place, and return the optimizer's state.

    A step takes 8 pieces of 64 tokens from anywhere in the text; the rate falls to zero. To
    interrupt a training, `stop` at a step; to resume it, `start` there, with the state returned.
    """
    tokens, generator = encode(tokenizer, text, model.device), torch.Generator().manual_seed(seed)
    places = torch.randint(len(tokens) - 64, (steps, 8, 1), generator=generator)
    pieces = places.to(tokens.device) + torch.arange(65, device=tokens.device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    if state is not None:
        optimizer.load_state_dict(state)
    for step in range(start, steps if stop is None else stop):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        loss = token_bits(model, tokenizer, tokens[pieces[step]]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer.state_dict()
