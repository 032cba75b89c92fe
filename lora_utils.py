"""LoRA from the ground up: the one module that all notebooks share.

Read it from top to bottom, it is ordered like a chapter: where to compute, the LoRA layers, what
you can do with an adapted model, adapter files, MNIST, and a few helpers to look at results.

Symbols are those of the paper (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
https://arxiv.org/abs/2106.09685): a frozen weight W₀ (out × in), its update ΔW = (α/r)·B·A with
B (out × r) and A (r × in), the rank r, and the constant α.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getsource
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from filelock import FileLock
from IPython.display import Markdown, display
from torch.nn.utils import parametrize
from tqdm import tqdm

# --------------------------------------------------------------------------------------
# Where to compute
# --------------------------------------------------------------------------------------


def pick_device() -> torch.device:
    """Return the fastest device at hand: an NVIDIA or AMD GPU, an Apple GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


# --------------------------------------------------------------------------------------
# The LoRA layers (paper, section 4.1)
# --------------------------------------------------------------------------------------


class LoRAFactors(nn.Module):
    """The factors B and A of a low-rank update ΔW = (α/r)·B·A to one weight W₀.

    A (`lora_A`, r × in) starts Gaussian with standard deviation 1/√in. B (`lora_B`, out × r)
    starts at zero, so ΔW is zero until the first training step. Both take the weight's device
    and dtype. `strength` scales the update after training: 1 is as trained, 0 is off.

    Args:
        weight: the weight W₀ to adapt, out × in.
        rank: r, from 1 to min(out, in).
        alpha: α, a positive number.

    Raises:
        ValueError: the weight is not a matrix, or the rank or alpha is out of range.
    """

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float):
        super().__init__()
        _check_settings(weight.shape, rank, alpha)
        out_features, in_features = weight.shape
        like = {"device": weight.device, "dtype": weight.dtype}
        self.lora_A = nn.Parameter(torch.randn(rank, in_features, **like) / math.sqrt(in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, **like))
        self.rank, self.alpha, self.strength = rank, alpha, 1.0

    @property
    def scaling(self) -> float:
        """What B·A is multiplied by: α/r, times the strength."""
        return self.strength * self.alpha / self.rank


def _check_settings(shape: torch.Size, rank: int, alpha: float) -> None:
    """Raise a ValueError if a weight of this shape cannot have LoRA of this rank and alpha."""
    if len(shape) != 2:
        raise ValueError(f"LoRA adapts a weight of 2 dimensions, this one has shape {tuple(shape)}")
    if type(rank) is not int or not 1 <= rank <= min(shape):
        raise ValueError(
            f"rank must be a whole number from 1 to {min(shape)} "
            f"for a weight of shape {tuple(shape)}, not {rank!r}"
        )
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a positive number, not {alpha!r}")


class LoRAParametrization(LoRAFactors):
    """LoRA as a function of the weight: W = W₀ + ΔW, built anew in each forward pass.

    Hand it to `torch.nn.utils.parametrize.register_parametrization(layer, "weight", ...)`. Then
    `layer.weight` is W, and W₀ stays in `layer.parametrizations.weight.original`.
    """

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W (out × in) for the weight W₀ (out × in)."""
        if self.strength == 0:
            return weight
        return torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.scaling)


class LoRALinear(LoRAFactors):
    """LoRA as a second branch beside a frozen linear layer: h = W₀x + b + (α/r)·B·A·x.

    It never builds the out × in product B·A, which makes it the cheaper form to train.

    Args:
        base: the linear layer that holds W₀ and b. It is frozen.
        rank, alpha: as in `LoRAFactors`.

    Raises:
        ValueError: the rank or alpha is out of range.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__(base.weight, rank, alpha)
        self.base = base.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h (… × out) for the input x (… × in)."""
        if self.strength == 0:
            return self.base(x)
        return self.base(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


# --------------------------------------------------------------------------------------
# What you can do with an adapted model
# --------------------------------------------------------------------------------------


def add_lora(model: nn.Module, rank: int, alpha: float, targets: list[str]) -> None:
    """Freeze the model and turn its target layers into `LoRALinear` layers, in place.

    Args:
        model: any model with `nn.Linear` layers.
        rank, alpha: as in `LoRAFactors`, the same for each target.
        targets: names of linear layers. As in PEFT, "query" stands for each layer whose full
            name is "query" or ends in ".query".

    Raises:
        ValueError: a target names no linear layer, a target already has LoRA or another
            parametrization, or the rank or alpha is out of range. The model is then unchanged.
    """
    layers, adapted = _find_targets(model, targets), lora_layers(model)
    for name, layer in layers.items():
        if name in adapted:
            raise ValueError(f"{name} already has LoRA: call merge_lora or remove_lora first")
        _check_settings(layer.weight.shape, rank, alpha)
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, LoRALinear(layer, rank, alpha))


def _find_targets(model: nn.Module, targets: list[str]) -> dict[str, nn.Linear]:
    """Return the linear layers that the targets name; of a `LoRALinear`, the one inside."""
    adapted = lora_layers(model)
    linear, inside = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            linear[name] = module.base
            inside.add(module.base)
        elif isinstance(module, nn.Linear) and module not in inside:
            linear[name] = module
    linear.pop("", None)  # a model cannot replace itself, so it cannot be its own target
    if not isinstance(targets, list) or not targets:
        raise ValueError(f"targets must be a list of layer names, not {targets!r}")
    found = {}
    for target in targets:
        matches = {n: m for n, m in linear.items() if n == target or n.endswith(f".{target}")}
        if not matches:
            names = ", ".join(linear) or "none"
            raise ValueError(f"no linear layer is named {target!r}; there are {names}")
        found |= matches
    for name, layer in found.items():
        if parametrize.is_parametrized(layer, "weight") and name not in adapted:
            raise ValueError(f"the weight of {name} has a parametrization that is not LoRA")
    return found


def lora_layers(model: nn.Module) -> dict[str, LoRAFactors]:
    """Return the LoRA factors of each adapted layer by the layer's name, in the model's order.

    Raises:
        ValueError: a parametrization of LoRA was registered twice on one layer.
    """
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            layers[name] = module
        elif parametrize.is_parametrized(module, "weight"):
            for parametrization in module.parametrizations.weight:
                if isinstance(parametrization, LoRAParametrization):
                    if name in layers:
                        raise ValueError(f"LoRA is registered twice on {name}")
                    layers[name] = parametrization
    return layers


def _require_lora(model: nn.Module) -> dict[str, LoRAFactors]:
    """Return the model's LoRA layers; raise a ValueError if it has none."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layers: call add_lora first")
    return layers


def _require_removable_lora(model: nn.Module) -> dict[str, LoRAFactors]:
    """Return the model's LoRA layers; raise a ValueError if they cannot be replaced."""
    if isinstance(model, LoRALinear):
        raise ValueError("a LoRALinear cannot replace itself: hand over the model that holds it")
    return _require_lora(model)


def set_lora_strength(model: nn.Module, strength: float) -> None:
    """Scale the update of every adapted layer: 1 is as trained, 0 is the base model exactly.

    Raises:
        ValueError: the model has no LoRA, or the strength is not a finite number.
    """
    if not isinstance(strength, int | float) or not math.isfinite(strength):
        raise ValueError(f"strength must be a finite number, not {strength!r}")
    for layer in _require_lora(model).values():
        layer.strength = strength


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Switch LoRA off inside a `with` block, where the model is its base, bit for bit.

    Raises:
        ValueError: the model has no LoRA.
    """
    before = {layer: layer.strength for layer in _require_lora(model).values()}
    set_lora_strength(model, 0)
    try:
        yield
    finally:
        for layer, strength in before.items():
            layer.strength = strength


def merge_lora(model: nn.Module) -> None:
    """Add each ΔW to its W₀, at the present strength, and take the LoRA layers away, in place.

    The layers are plain `nn.Linear` again, still frozen (`model.requires_grad_()` undoes that).

    Raises:
        ValueError: the model has no LoRA, or LoRA is switched off: merging would lose it. The
            model is then unchanged.
    """
    layers = _require_removable_lora(model)
    for name, layer in layers.items():
        if layer.strength == 0:
            raise ValueError(f"LoRA is off in {name}: set its strength, or call remove_lora")
    for name, layer in layers.items():
        if isinstance(layer, LoRALinear):
            with torch.no_grad():
                layer.base.weight.addmm_(layer.lora_B, layer.lora_A, alpha=layer.scaling)
            model.set_submodule(name, layer.base)
        else:
            parametrized = model.get_submodule(name)
            parametrize.remove_parametrizations(parametrized, "weight", leave_parametrized=True)


def remove_lora(model: nn.Module) -> None:
    """Take the LoRA layers away, in place: each weight is its W₀ again, bit for bit.

    The layers are plain `nn.Linear` again, still frozen (`model.requires_grad_()` undoes that).

    Raises:
        ValueError: the model has no LoRA.
    """
    for name, layer in _require_removable_lora(model).items():
        if isinstance(layer, LoRALinear):
            model.set_submodule(name, layer.base)
        else:
            parametrized = model.get_submodule(name)
            parametrize.remove_parametrizations(parametrized, "weight", leave_parametrized=False)


class ParameterCount(NamedTuple):
    """How many numbers a model holds, and how many of them training changes."""

    total: int
    trainable: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the numbers in all parameters of a model, and in those that need a gradient."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return ParameterCount(sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained))


# --------------------------------------------------------------------------------------
# Adapter files, in the format of Hugging Face PEFT
# --------------------------------------------------------------------------------------

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of all factors: "fc1.lora_A" (r × in), "fc1.lora_B" (out × r), and so on.

    Raises:
        ValueError: the model has no LoRA.
    """
    return {name: factor.detach().clone() for name, factor in _factors(model).items()}


def _factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the factors themselves, named as by `lora_state_dict`."""
    return {
        f"{name}.{factor}": getattr(layer, factor)
        for name, layer in _require_lora(model).items()
        for factor in ("lora_A", "lora_B")
    }


def load_lora_state_dict(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy factors, named as by `lora_state_dict`, into an adapted model.

    Raises:
        ValueError: the model has no LoRA, or a factor is missing, unknown or of another shape.
            The model is then unchanged.
    """
    parameters = _factors(model)
    _check_factors(state, {name: parameter.shape for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def _check_factors(state: dict[str, torch.Tensor], expected: dict[str, tuple]) -> None:
    """Raise a ValueError unless the state has exactly the tensors that are expected, by shape."""
    if missing := sorted(expected.keys() - state.keys()):
        raise ValueError(f"the adapter lacks {', '.join(missing)}")
    if unknown := sorted(state.keys() - expected.keys()):
        raise ValueError(f"the adapter has {', '.join(unknown)}, which the model has no place for")
    for name, shape in expected.items():
        if tuple(state[name].shape) != tuple(shape):
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)} in the adapter, "
                f"but the model and the rank ask for {tuple(shape)}"
            )


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter into a folder that PEFT and `load_adapter` can read.

    The strength is not saved: the file holds the adapter as trained. Both files are complete
    under temporary names before the first is renamed, and the weights are renamed last. So a
    save that is cut off leaves the adapter that was there before.

    Args:
        model: a model with LoRA.
        folder: created if missing; an adapter in it is replaced.

    Raises:
        ValueError: the model has no LoRA, its layers differ in rank or alpha, or their names
            stand for other layers too.
        OSError: the folder cannot be written.
    """
    layers = _require_lora(model)
    settings = {(layer.rank, layer.alpha) for layer in layers.values()}
    if len(settings) > 1:
        raise ValueError(f"all layers must share one rank and one alpha, not {sorted(settings)}")
    [(rank, alpha)] = settings
    if others := _find_targets(model, list(layers)).keys() - layers.keys():
        raise ValueError(f"the names {list(layers)} stand for {sorted(others)} too")
    config = json.dumps(
        {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": list(layers),
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        },
        indent=2,
    )
    tensors = {_peft_name(n): t.cpu().contiguous() for n, t in lora_state_dict(model).items()}
    weights = safetensors.torch.save(tensors, metadata={"format": "pt", CONFIG_FILE: config})
    files = {CONFIG_FILE: config.encode(), WEIGHTS_FILE: weights}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    old_config = (folder / CONFIG_FILE).read_bytes() if (folder / CONFIG_FILE).exists() else None
    try:
        for name, content in files.items():
            (folder / f"{name}.tmp").write_bytes(content)
        os.replace(folder / f"{CONFIG_FILE}.tmp", folder / CONFIG_FILE)
        try:
            os.replace(folder / f"{WEIGHTS_FILE}.tmp", folder / WEIGHTS_FILE)
        except OSError:  # put back the settings of the weights that stay
            if old_config is None:
                (folder / CONFIG_FILE).unlink()
            else:
                (folder / CONFIG_FILE).write_bytes(old_config)
            raise
    finally:
        for name in files:
            (folder / f"{name}.tmp").unlink(missing_ok=True)


def _peft_name(name: str) -> str:
    """Return the name that a factor has in PEFT's file."""
    return f"base_model.model.{name}.weight"


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Give the model the adapter in a folder, in place of the LoRA layers it has, if any.

    Reads what `save_adapter` wrote, and what PEFT saved for linear layers.

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: a file is damaged, the adapter is not plain LoRA, or its rank, targets or
            shapes do not fit the model or each other. The model is then unchanged.
    """
    config, tensors = _read_adapter(Path(folder))
    rank, alpha = config["r"], config["lora_alpha"]
    layers = _find_targets(model, config["target_modules"])
    expected = {}
    for name, layer in layers.items():
        _check_settings(layer.weight.shape, rank, alpha)
        expected[_peft_name(f"{name}.lora_A")] = (rank, layer.in_features)
        expected[_peft_name(f"{name}.lora_B")] = (layer.out_features, rank)
    _check_factors(tensors, expected)
    if lora_layers(model):
        remove_lora(model)
    add_lora(model, rank, alpha, list(layers))
    load_lora_state_dict(model, {n: tensors[_peft_name(n)] for n in _factors(model)})


# Settings that change what an adapter computes without changing its tensors.
NOT_PLAIN_LORA = (
    *("use_rslora", "use_dora", "use_qalora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"),
    *("alora_invocation_tokens", "layer_replication"),
)


def _read_adapter(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return the settings and the tensors in an adapter's folder, checked against each other."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no adapter in {folder}: it has no file {name}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with safetensors.safe_open(folder / WEIGHTS_FILE, "pt") as file:
            saved_config = (file.metadata() or {}).get(CONFIG_FILE)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"an adapter file in {folder} is damaged: {error}") from error
    if saved_config and json.loads(saved_config) != config:
        raise ValueError(f"{CONFIG_FILE} in {folder} is not the one saved with {WEIGHTS_FILE}")
    needed = {"peft_type", "r", "lora_alpha", "target_modules"}
    if not isinstance(config, dict) or needed - config.keys() or config["peft_type"] != "LORA":
        raise ValueError(f"{CONFIG_FILE} in {folder} does not describe a LoRA adapter")
    extras = [name for name in NOT_PLAIN_LORA if config.get(name)]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        extras.append("init_lora_weights")  # PiSSA and its like change W₀ too
    if extras:
        raise ValueError(f"the adapter in {folder} uses {', '.join(extras)}: not plain LoRA")
    return config, tensors


# --------------------------------------------------------------------------------------
# MNIST and RichBoyNet
# --------------------------------------------------------------------------------------

DATA = Path(__file__).resolve().parent / "data"
MNIST_CHECKSUMS = {"train": 0x60637407, "test": 0x895A175A}  # CRC-32 of pixels, then labels


class Digits(NamedTuple):
    """Handwritten digits: images (N × 28 × 28, standardised floats) and labels (N, 0 to 9)."""

    images: torch.Tensor
    labels: torch.Tensor


def load_mnist(device: torch.device) -> tuple[Digits, Digits]:
    """Return MNIST's 60,000 training and 10,000 test digits as tensors on the device.

    The first call unpacks the archives in `data/`, or downloads them where they are missing.

    Raises:
        RuntimeError: the files are damaged and cannot be downloaded anew.
    """
    return _load_digits("train", device), _load_digits("test", device)


def _load_digits(part: str, device: torch.device) -> Digits:
    """Return the part "train" or "test", once its checksum has been compared."""
    raw = DATA / "MNIST" / "raw"
    advice = f"delete the files without .gz in {raw} and run again, or fetch the archives anew"
    try:
        with FileLock(DATA / "MNIST.lock"):  # two notebooks must not unpack at the same time
            mnist = torchvision.datasets.MNIST(DATA, train=part == "train", download=True)
    except Exception as error:
        raise RuntimeError(f"MNIST cannot be read: {advice}") from error
    checksum = zlib.crc32(mnist.targets.numpy(), zlib.crc32(mnist.data.numpy()))
    if checksum != MNIST_CHECKSUMS[part]:
        raise RuntimeError(f"MNIST's {part} files are damaged: {advice}")
    pixels = mnist.data.to(device, torch.float32) / 255
    return Digits((pixels - 0.1307) / 0.3081, mnist.targets.to(device))


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
    hang on the last few batches.

    Returns:
        The loss of each batch, before the step it causes.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / batches)
    count, device = len(data.labels), data.labels.device
    epochs = math.ceil(batches * batch_size / count)
    order = torch.cat([torch.randperm(count, device=device) for _ in range(epochs)])
    losses = []
    for batch in tqdm(order[: batches * batch_size].view(batches, batch_size), leave=False):
        loss = F.cross_entropy(model(data.images[batch]), data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


@torch.no_grad()
def errors_per_digit(model: nn.Module, data: Digits) -> torch.Tensor:
    """Count the wrong answers for each true digit: a tensor of 10 whole numbers, on the CPU."""
    wrong = model(data.images).argmax(dim=1) != data.labels
    return torch.bincount(data.labels[wrong], minlength=10).cpu()


# --------------------------------------------------------------------------------------
# Looking at results
# --------------------------------------------------------------------------------------


def check(claim: str, condition: bool) -> None:
    """Print the claim with a tick if it holds, or raise an AssertionError that names it."""
    if not condition:
        raise AssertionError(f"this does not hold: {claim}")
    print(f"✓ {claim}")


def compare(name: str, ours: torch.Tensor, reference: torch.Tensor) -> None:
    """Print whether two tensors or arrays are equal, equal up to rounding, and how far apart."""
    ours, reference = (torch.as_tensor(t).detach().cpu().double() for t in (ours, reference))
    if ours.shape != reference.shape:
        raise ValueError(f"{name}: shapes {tuple(ours.shape)} and {tuple(reference.shape)} differ")
    difference = (ours - reference).abs().max().item()
    print(
        f"{name}: exact {torch.equal(ours, reference)} | approximate "
        f"{torch.allclose(ours, reference)} | largest difference {difference:.1e}"
    )


def say(sentence: str) -> None:
    """Show a sentence of Markdown, so that prose can carry the numbers of this very run."""
    display(Markdown(sentence))


def show_source(thing: type) -> None:
    """Show the source code of a class or function, highlighted."""
    display(Markdown(f"```python\n{getsource(thing)}```"))


# One colour for each meaning, in all notebooks; colour-blind safe together.
COLORS = {"base": "#4d4d4d", "full": "#009e73", "theory": "#8c8c8c"}


def rank_color(rank: int) -> tuple:
    """Return the colour that stands for LoRA of a rank, from light (1) to dark (64)."""
    steps = [1, 2, 3, 4, 8, 16, 32, 64]
    return plt.colormaps["plasma"](np.interp(rank, steps, np.linspace(0.82, 0.0, len(steps))))


def set_plot_style() -> None:
    """Set the look of all figures: 700 pixels wide, light grid, readable type."""
    plt.rcParams.update(
        {
            "figure.figsize": (7, 4),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlelocation": "left",
            "grid.color": "#e5e5e5",
            "legend.frameon": False,
        }
    )


def show_images(images: torch.Tensor, titles: list[str], columns: int = 10) -> None:
    """Draw grey images (N × height × width) in rows, each with its title."""
    rows = math.ceil(len(images) / columns)
    _, axes = plt.subplots(rows, columns, figsize=(7, 7 / columns * rows * 1.3), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    titled = zip(torch.as_tensor(images).cpu().numpy(), titles, strict=True)
    for ax, (image, title) in zip(axes.flat, titled, strict=False):
        ax.imshow(image, cmap="gray")
        ax.set_title(title, fontsize=10, loc="center")
    plt.show()


def plot_errors_per_digit(errors: dict[str, torch.Tensor], colors: list, title: str) -> None:
    """Draw wrong answers for each digit as grouped bars, one group of bars for each digit.

    Args:
        errors: by name, counts as `errors_per_digit` returns them.
        colors: one for each name.
        title: what the figure shows.
    """
    _, ax = plt.subplots()
    width = 0.8 / len(errors)
    for i, ((name, counts), color) in enumerate(zip(errors.items(), colors, strict=True)):
        offset = (i - (len(errors) - 1) / 2) * width
        ax.bar(np.arange(10) + offset, counts.tolist(), width, color=color, label=name)
    ax.set(xticks=range(10), xlabel="true digit", ylabel="wrong answers", title=title, ylim=0)
    ax.grid(axis="x", visible=False)
    if len(errors) > 1:
        ax.legend()
    plt.show()
