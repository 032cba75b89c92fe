"""Low-Rank Adaptation (LoRA) in PyTorch: layers, operations, adapter files.

Symbols are those of the paper (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
https://arxiv.org/abs/2106.09685): a frozen weight W₀ (out × in), its update ΔW = (α/r)·B·A with
B (out × r) and A (r × in), the rank r, and the constant α. Names that begin with `_` are details,
at the end of each part: skip them on a first reading.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
import torch.nn as nn
from torch.nn.utils import parametrize

# --- The LoRA layers (notebook 2; paper, section 4.1) -------------------------------------------


class LoRAFactors(nn.Module):
    """The factors B and A of an update ΔW = s·B·A to the weight W₀ of a linear layer.

    A (`lora_A`, r × in) starts Gaussian with standard deviation 1/√in, B (`lora_B`, out × r) at
    zero, so ΔW is zero until the first training step. The scaling is s = strength · α/r, where a
    `strength` of 1 is as trained and 0 is off. Of `base`, sizes, device and dtype are used.

    Raises:
        ValueError: the rank is not from 1 to min(out, in), or alpha is not a positive number.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        largest = min(base.out_features, base.in_features)
        if not isinstance(rank, Integral) or not 1 <= rank <= largest:
            raise ValueError(f"rank must be a whole number from 1 to {largest}, not {rank!r}")
        if not isinstance(alpha, Real) or not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be a positive number, not {alpha!r}")
        kind = _device_and_dtype(base)
        A = torch.randn(rank, base.in_features, **kind) / math.sqrt(base.in_features)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **kind))
        self.rank, self.alpha, self.strength = int(rank), alpha, 1.0

    @property
    def scaling(self) -> float:
        """s, what B·A is multiplied by: α/r, times the strength."""
        return self.strength * self.alpha / self.rank

    def delta_W(self) -> torch.Tensor:
        """Return ΔW = s·B·A (out × in)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W = W₀ + s·B·A (out × in) for the weight W₀."""
        return torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.scaling)  # its alpha is s

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the settings."""
        return f"rank={self.rank}, alpha={self.alpha}, strength={self.strength}"


class LoRALinear(LoRAFactors):
    """LoRA as a second branch beside a linear layer: h = W₀x + b + s·B·A·x.

    It never builds the out × in product B·A, which makes it the cheaper form to train
    (notebook 6). `add_lora` puts it into a model and freezes W₀ and b.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__(base, rank, alpha)
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h (… × out) for the input x (… × in): examples are rows, hence the transposes."""
        h = self.base(x)
        if self.strength == 0:  # off: the base bit for bit, even where 0 · ∞ would be NaN
            return h
        return h + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


class LoRAParametrization(LoRAFactors):
    """LoRA as a function of the weight: W = W₀ + s·B·A, built anew in each forward pass.

    Notebook 3 registers it by hand, with `torch.nn.utils.parametrize.register_parametrization`.
    Then `layer.weight` is W, and W₀ stays in `layer.parametrizations.weight.original`.
    """

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W (out × in) for the weight W₀ (out × in)."""
        if self.strength == 0:
            return weight
        return self.merged(weight)


def _device_and_dtype(base: nn.Linear) -> dict:
    """Return the device of a layer, and the dtype of its factors: the first floating one in it."""
    tensors = [*base.parameters(), *base.buffers()]  # of a packed 4-bit weight, the scales float
    floating = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    return {"device": tensors[0].device, "dtype": floating[0] if floating else torch.float32}


# --- What you can do with an adapted model (notebooks 3 and 4) ----------------------------------


def add_lora(model: nn.Module, rank: int, alpha: float, targets: list[str]) -> None:
    """Turn the model's target layers into `LoRALinear` and freeze all but LoRA, in place.

    Each target is the name of a linear layer. As in PEFT, "query" stands for each layer whose
    full name is "query" or ends in ".query". All get the same rank and alpha.

    Raises:
        ValueError: a target names no linear layer or one that cannot have LoRA, or the rank or
            alpha is out of range. The model is then unchanged.
    """
    layers = _find_targets(model, targets)
    twice = lora_layers(model).keys() & layers.keys()
    if twice:
        raise ValueError(f"{sorted(twice)} have LoRA already: call merge_lora or remove_lora first")
    _put_in_place(model, {name: LoRALinear(base, rank, alpha) for name, base in layers.items()})


def _put_in_place(model: nn.Module, adapted: dict[str, LoRALinear]) -> None:
    """Put finished LoRA layers into the model, and freeze everything that is no factor."""
    for name, layer in adapted.items():
        model.set_submodule(name, layer)
    for name, parameter in model.named_parameters():
        if not name.endswith((".lora_A", ".lora_B")):
            parameter.requires_grad_(False)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the `LoRALinear` layers of a model by name, in the model's order.

    Raises:
        ValueError: the model is wrapped, so that its layers have other names.
    """
    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):  # the last by torch.compile
        inner = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
        raise ValueError(f"{type(model).__name__} renames the layers: hand over model.{inner}")
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def set_lora_strength(model: nn.Module, strength: float) -> None:
    """Scale the update of every adapted layer: 1 is as trained, 0 is the base model exactly.

    Raises:
        ValueError: the model has no LoRA, or the strength is not a finite number.
    """
    if not isinstance(strength, Real) or not math.isfinite(strength):
        raise ValueError(f"strength must be a finite number, not {strength!r}")
    for factors in _all_factors(model):
        factors.strength = strength


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Switch LoRA off inside a `with` block, where the model is its base, bit for bit.

    Raises:
        ValueError: the model has no LoRA.
    """
    before = [(factors, factors.strength) for factors in _all_factors(model)]
    set_lora_strength(model, 0)
    try:
        yield
    finally:
        for factors, strength in before:
            factors.strength = strength


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add each ΔW to its W₀, at the present strength, and take the LoRA layers away, in place.

    The layers are plain linear layers again, still frozen (`model.requires_grad_()` undoes that).

    Raises:
        ValueError: there is no LoRA or it is off, a weight is shared with another layer or not
            stored as floats, or the sum is not finite. The model is then unchanged.
    """
    layers = _require_lora(model)
    _refuse_unmergeable(model, layers)
    for name, layer in layers.items():
        layer.base.weight.copy_(layer.merged(layer.base.weight))
        model.set_submodule(name, layer.base)


def remove_lora(model: nn.Module) -> None:
    """Take the LoRA layers away, in place: each weight is its W₀ again, bit for bit.

    The layers are plain linear layers again, still frozen (`model.requires_grad_()` undoes that).

    Raises:
        ValueError: the model has no LoRA.
    """
    for name, layer in _require_lora(model).items():
        model.set_submodule(name, layer.base)


class ParameterCount(NamedTuple):
    """How many numbers a model holds, and how many of them training changes."""

    total: int
    trainable: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the numbers in all parameters of a model, and in those that need a gradient."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return ParameterCount(sum(p.numel() for p in parameters), trainable)


# Details: find the layers, refuse what would go wrong.


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return all linear layers by name. Where LoRA is, that is its base, by the name it had."""
    adapted, linear = lora_layers(model), {}
    for name, module in model.named_modules():
        if name and isinstance(module, nn.Linear):
            outer = name.removesuffix(".base")
            linear[outer if outer in adapted else name] = module
    return linear


def _find_targets(model: nn.Module, targets: list[str]) -> dict[str, nn.Linear]:
    """Return the linear layers that the targets name, in the targets' order."""
    if not isinstance(targets, list) or not targets:
        raise ValueError(f"targets must be a list of layer names, not {targets!r}")
    linear, found = _linear_layers(model), {}
    for target in targets:
        matches = {n: m for n, m in linear.items() if n == target or n.endswith(f".{target}")}
        if not matches:
            raise ValueError(f"no linear layer is {target!r}; there are {_last_parts(linear)}")
        found |= matches
    for name, layer in found.items():
        _refuse_unadaptable(model, name, layer)
    return found


def _last_parts(names: Iterable[str]) -> str:
    """Return the different last parts of layer names, for an error message."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names)) or "none"


def _refuse_unadaptable(model: nn.Module, name: str, layer: nn.Linear) -> None:
    """Raise a ValueError if LoRA in this place would fail later or be passed over in silence."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        reason = f"{type(owner).__name__} reads the weight itself and does not call the layer"
        raise ValueError(f"{name} cannot have LoRA: {reason}")
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is layer]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} are one layer: LoRA would reach only the first")
    if parametrize.is_parametrized(layer, "weight"):
        raise ValueError(f"{name} cannot have LoRA: its weight has a parametrization already")


def _require_lora(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the model's LoRA layers; raise a ValueError if there are none to work on."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRALinear layers: call add_lora first")
    if "" in layers:
        raise ValueError("this is a LoRALinear alone: hand over the model that holds it")
    return layers


def _all_factors(model: nn.Module) -> list[LoRAFactors]:
    """Return the factors of a model in either form; raise a ValueError if there are none."""
    found = [module for module in model.modules() if isinstance(module, LoRAFactors)]
    if not found:
        raise ValueError("the model has no LoRA: call add_lora first")
    return found


def _refuse_unmergeable(model: nn.Module, layers: dict[str, LoRALinear]) -> None:
    """Raise a ValueError if merging one of the layers would lose or spoil something."""
    named = list(model.named_parameters(remove_duplicate=False))
    for name, layer in layers.items():
        weight = dict(layer.base.named_parameters()).get("weight")  # not a computed one
        if layer.strength == 0:
            raise ValueError(f"LoRA is off in {name}: set its strength, or call remove_lora")
        if weight is None or not weight.is_floating_point():
            raise ValueError(f"the weight of {name} is not stored as floats: dequantise it first")
        names = [n for n, p in named if p is weight]  # a tied output head is the embedding, too
        if len(names) > 1:
            raise ValueError(f"merging would change {' and '.join(names)}: they are one")
        if not torch.isfinite(layer.merged(weight)).all():
            raise ValueError(f"merging would put NaN or infinity into {name}")


# --- Adapter files, in the format of Hugging Face PEFT (notebook 4) -----------------------------

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of all factors: "fc1.lora_A" (r × in), "fc1.lora_B" (out × r), and so on.

    Raises:
        ValueError: the model has no LoRA.
    """
    factors = _named_factors(_require_lora(model))
    return {name: factor.detach().clone() for name, factor in factors.items()}


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy factors, named as by `lora_state_dict`, into an adapted model.

    Raises:
        ValueError: the model has no LoRA, or a factor is missing, unknown or of another shape.
            The model is then unchanged.
    """
    factors = _named_factors(_require_lora(model))
    _check_shapes(state, factors)
    for name, factor in factors.items():
        factor.copy_(state[name])


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter into a folder that PEFT and `load_adapter` can read.

    The folder is created if missing; an adapter in it is replaced. The strength is not saved: the
    files hold the adapter as trained. Each file is written whole under a name of its own, forced
    to the disk and then renamed, the weights before the settings. So a save that is cut off
    leaves the old adapter, the new one, or a pair of files that `load_adapter` refuses.

    Raises:
        ValueError: the model has no LoRA, its layers differ in rank or alpha, or their names
            stand for other layers too.
        OSError: the folder cannot be written.
    """
    layers = _require_lora(model)
    ranks_and_alphas = {(layer.rank, layer.alpha) for layer in layers.values()}
    if len(ranks_and_alphas) > 1:
        raise ValueError(f"all layers must share rank and alpha, not {sorted(ranks_and_alphas)}")
    others = _find_targets(model, list(layers)).keys() - layers.keys()
    if others:  # in PEFT, "fc" names "block.fc", too
        raise ValueError(f"the names {list(layers)} stand for {sorted(others)} too")
    [(rank, alpha)] = ranks_and_alphas
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(layers)}
    config |= {"lora_dropout": 0.0, "bias": "none", "inference_mode": True}
    settings = json.dumps(config, indent=2, default=float)  # by default, JSON has no NumPy numbers
    tensors = {
        f"base_model.model.{name}.weight": factor.detach().cpu().contiguous()
        for name, factor in _named_factors(layers).items()
    }
    # A copy of the settings travels with the weights: load_adapter sees whether the files belong
    # together.
    weights = safetensors.torch.save(tensors, metadata={"format": "pt", CONFIG_FILE: settings})
    _write_files(Path(folder), {WEIGHTS_FILE: weights, CONFIG_FILE: settings.encode()})


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Give the model the adapter in a folder, in place of the LoRA layers it has, if any.

    Reads what `save_adapter` wrote, and what PEFT saved for linear layers. The names of the
    tensors say which layers are meant. No random number is drawn.

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: a file is damaged, the adapter is not plain LoRA, or it does not fit the
            model. The model is then unchanged.
    """
    config, state = _read_adapter(Path(folder))
    linear, adapted = _linear_layers(model), {}
    for name in dict.fromkeys(factor.rpartition(".")[0] for factor in state):
        if name not in linear:
            raise ValueError(f"the adapter is for {name}; the model has {_last_parts(linear)}")
        base = linear[name]
        _refuse_unadaptable(model, name, base)
        # Around an empty layer: checks rank and alpha, allocates nothing, draws no random number.
        empty = nn.Linear(base.in_features, base.out_features, device="meta")
        adapted[name] = LoRALinear(empty, config["r"], config["lora_alpha"])
    _check_shapes(state, _named_factors(adapted))
    for name, layer in adapted.items():
        layer.base, like_base = linear[name], _device_and_dtype(linear[name])
        layer.lora_A = nn.Parameter(state[f"{name}.lora_A"].to(**like_base))
        layer.lora_B = nn.Parameter(state[f"{name}.lora_B"].to(**like_base))
    if lora_layers(model):
        remove_lora(model)
    _put_in_place(model, adapted)


# Details: names and shapes, files.


def _named_factors(layers: dict[str, LoRALinear]) -> dict[str, nn.Parameter]:
    """Return the factors themselves, named as by `lora_state_dict`."""
    factors = {}
    for name, layer in layers.items():
        factors |= {f"{name}.lora_A": layer.lora_A, f"{name}.lora_B": layer.lora_B}
    return factors


def _check_shapes(state: dict[str, torch.Tensor], factors: dict[str, nn.Parameter]) -> None:
    """Raise a ValueError unless the state has exactly these factors, in these shapes."""
    if missing := sorted(factors.keys() - state.keys()):
        raise ValueError(f"the adapter lacks {', '.join(missing)}")
    if unknown := sorted(state.keys() - factors.keys()):
        raise ValueError(f"the adapter has {', '.join(unknown)}, which the model has no place for")
    for name, factor in factors.items():
        if state[name].shape != factor.shape:
            shape, found = tuple(factor.shape), tuple(state[name].shape)
            raise ValueError(f"{name} must have shape {shape}, not {found}")


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files completely before the first takes its place, in the order given."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as ours:  # no other process writes there
        for name, content in files.items():
            with Path(ours, name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # on the disk, not in a cache
        for name in files:
            os.replace(Path(ours, name), folder / name)
    if os.name == "posix":  # force the new names to the disk, too; Windows cannot
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


# Settings that change what an adapter computes without changing the names of its tensors.
NOT_PLAIN_LORA = (
    "use_rslora use_dora use_qalora fan_in_fan_out rank_pattern alpha_pattern "
    "alora_invocation_tokens layer_replication"
).split()


def _read_adapter(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return an adapter's settings, and its factors named as by `lora_state_dict`."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no adapter in {folder}: it has no file {name}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with safetensors.safe_open(folder / WEIGHTS_FILE, "pt") as file:
            saved_config = (file.metadata() or {}).get(CONFIG_FILE)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"an adapter file in {folder} is damaged: {error}") from error
    if saved_config and json.loads(saved_config) != config:
        raise ValueError(f"{CONFIG_FILE} in {folder} is not the one saved with {WEIGHTS_FILE}")
    _refuse_unless_plain(config, folder)
    factors = {}
    for name, tensor in tensors.items():
        plain = re.fullmatch(r"base_model\.model\.(.+\.lora_[AB])\.weight", name)
        if not plain:
            raise ValueError(f"the adapter in {folder} holds {name}: not plain LoRA")
        factors[plain[1]] = tensor
    if not factors:
        raise ValueError(f"{WEIGHTS_FILE} in {folder} holds no factors")
    return config, factors


def _refuse_unless_plain(config: dict, folder: Path) -> None:
    """Raise a ValueError if the settings ask for more than h = W₀x + (α/r)·B·A·x."""
    needed = {"peft_type", "r", "lora_alpha"}
    if not isinstance(config, dict) or needed - config.keys() or config["peft_type"] != "LORA":
        raise ValueError(f"{CONFIG_FILE} in {folder} does not describe a LoRA adapter")
    extras = [name for name in NOT_PLAIN_LORA if config.get(name)]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        extras.append("init_lora_weights")  # PiSSA and its like change W₀ too
    if extras:
        raise ValueError(f"the adapter in {folder} uses {', '.join(extras)}: not plain LoRA")
