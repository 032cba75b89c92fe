"""Low-Rank Adaptation (LoRA) in PyTorch: the layers, what you can do with them, adapter files.

Symbols are those of the paper (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
https://arxiv.org/abs/2106.09685): the weight W₀ (out × in) of a layer is frozen and gets an update
ΔW = (α/r)·B·A, where B (out × r) and A (r × in) are trained, r is the rank, and α is a constant.

A function refuses with a ValueError what it cannot do right, and leaves the model unchanged. Names
that begin with `_` are details at the end of each part: skip them on a first reading.
"""

import json
import math
import os
import re
from collections import namedtuple
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors
import safetensors.torch
import torch
import torch.nn as nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

# --- The LoRA layers (notebook 2; paper, section 4.1) -------------------------------------------


class LoRAFactors(nn.Module):
    """The factors of the update ΔW = s·B·A to the weight W₀ (out × in) of a linear layer.

    A (`lora_A`, r × in) starts Gaussian with standard deviation 1/√in and B (`lora_B`, out × r) at
    zero, so ΔW is zero until the first training step. The scaling is s = strength · α/r, where a
    strength of 1 is the update as trained and 0 is off. Above r = min(out, in) nothing is gained.
    Over a 16-bit weight, too, the factors are float32: small steps would be rounded away in 16.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, device=None):
        super().__init__()
        _check_number("rank", rank, above=0, kind=Integral)
        _check_number("alpha", alpha, above=0)
        like = _device_and_dtype(base, device)
        A = torch.randn(rank, base.in_features, **like) / math.sqrt(base.in_features)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        self.rank = int(rank)
        self.alpha = alpha
        self.strength = 1.0

    @property
    def scaling(self) -> float:
        """s, by which B·A is multiplied: the strength times α/r."""
        return self.strength * self.alpha / self.rank

    def delta_W(self) -> torch.Tensor:
        """Return ΔW = s·B·A (out × in)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the settings."""
        return f"rank={self.rank}, alpha={self.alpha}, strength={self.strength}"


class LoRALinear(LoRAFactors):
    """LoRA as a second branch beside a linear layer: x ↦ W₀x + b + s·B·A·x.

    Inputs are … × in, outputs … × out. The branch never builds the out × in product B·A, which
    makes it the cheaper form to train (notebook 6). `add_lora` puts it into a model.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, device=None):
        super().__init__(base, rank, alpha, device)
        self.base = base

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Return the output for x. Vectors are rows here, hence the transposes."""
        h = self.base(x, *args, **kwargs)  # W₀x + b
        if self.strength == 0:  # off: the base bit for bit, even where 0 · ∞ would be NaN
            return h
        x = x.to(self.lora_A.dtype)  # x may have 16 bits, the factors have 32
        return (h + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)).to(h.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """W₀ + ΔW (out × in), for code that reads the weight instead of calling the layer."""
        W0 = self.base.weight
        if not W0.is_floating_point():
            raise AttributeError("packed into few bits: there is no such matrix")
        return W0 if self.strength == 0 else (W0 + self.delta_W()).to(W0.dtype)

    # What else other code may read of a linear layer.
    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)


class LoRAParametrization(LoRAFactors):
    """LoRA as a function of the weight: W₀ ↦ W₀ + s·B·A with s = strength·α/r, at each use.

    Register it by hand, with `torch.nn.utils.parametrize.register_parametrization`.
    Then `layer.weight` is the sum, and W₀ stays in `layer.parametrizations.weight.original`.
    """

    def forward(self, W0: torch.Tensor) -> torch.Tensor:
        """Return W₀ + ΔW (out × in) for W₀ (out × in)."""
        return W0 if self.strength == 0 else (W0 + self.delta_W()).to(W0.dtype)


def _check_number(name: str, value: object, above: float = -1e38, kind: type = Real) -> None:
    """Raise a ValueError unless this is a number of that kind, and one that a float32 can hold."""
    if not isinstance(value, kind) or isinstance(value, bool) or not above < value < 1e38:
        whole = "whole " if kind is Integral else ""
        between = f"a {whole}number above {above:g} and below 1e+38"
        raise ValueError(f"{name} must be {between}, not {value!r}")


def _device_and_dtype(base: nn.Linear, device: torch.device | str | None = None) -> dict:
    """Return where the factors of a layer go, by default beside its weight, and their dtype."""
    tensors = [*base.parameters(), *base.buffers()]
    device = device or tensors[0].device
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return {"device": device, "dtype": torch.float64 if double else torch.float32}


# --- What you can do with an adapted model, all of it in place (notebooks 3 and 4) --------------

ParameterCount = namedtuple("ParameterCount", "total trainable")


def add_lora(model: nn.Module, rank: int, alpha: float, targets: Iterable[str]) -> None:
    """Turn the model's target layers into `LoRALinear`, and freeze all but LoRA.

    Each target is the name of a linear layer. As in PEFT, "query" stands for every layer whose
    full name is "query" or ends in ".query". All get the same rank and alpha. Where a model holds
    many experts in one 3-D parameter, they are no linear layers, and no target reaches them.
    """
    layers = _find_targets(model, targets)
    if twice := sorted(layers.keys() & lora_layers(model)):
        raise ValueError(f"{twice} have LoRA already: call merge_lora or remove_lora first")
    adapted = {name: LoRALinear(base, rank, alpha) for name, base in layers.items()}
    for name, layer in adapted.items():
        model.set_submodule(name, layer)
    freeze_all_but_lora(model)


def freeze_all_but_lora(model: nn.Module) -> None:
    """Switch off the gradient of every parameter that is no factor of LoRA."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] not in ("lora_A", "lora_B"):
            parameter.requires_grad_(False)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the `LoRALinear` layers of a model by name, in the model's order."""
    _refuse_wrapped(model)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def set_lora_strength(model: nn.Module, strength: float) -> None:
    """Scale the update of every adapted layer: 1 is as trained, 0 is off (see `lora_disabled`)."""
    found = [module for module in model.modules() if isinstance(module, LoRAFactors)]
    if not found:
        raise ValueError("the model has no LoRA: call add_lora first")
    _check_number("strength", strength)
    for factors in found:
        factors.strength = float(strength)


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Switch LoRA off inside a `with` block, where the model is its base, bit for bit.

    That holds where training changed nothing but the factors. In training mode, BatchNorm also
    changes its running statistics: keep such layers in evaluation mode while you train.
    """
    before = {m: m.strength for m in model.modules() if isinstance(m, LoRAFactors)}
    set_lora_strength(model, 0)
    try:
        yield
    finally:
        for factors, strength in before.items():
            factors.strength = strength


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add each ΔW to its W₀, at the present strength, and take the LoRA layers away.

    The layers are plain linear layers again, still frozen (`model.requires_grad_()` undoes that).
    """
    layers = _require_lora(model)
    _refuse_unmergeable(model, layers)
    for name, layer in layers.items():
        layer.base.weight.copy_(layer.weight)
        model.set_submodule(name, layer.base)


def remove_lora(model: nn.Module) -> None:
    """Take the LoRA layers away: each weight is its W₀ again, bit for bit, and still frozen."""
    _require_lora(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.base)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a model's numbers, also those packed into few bits, and those that are trained."""
    total = sum(p.numel() for p in model.parameters())
    for layer in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        weight = [p for name, p in layer.named_parameters() if name != "bias"]
        if not any(p.is_floating_point() for p in weight):
            total += layer.out_features * layer.in_features - sum(p.numel() for p in weight)
    return ParameterCount(total, sum(p.numel() for p in model.parameters() if p.requires_grad))


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return all linear layers by name. Where LoRA is, that is its base, by the name it had."""
    outer = {f"{name}.base": name for name in lora_layers(model)}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {outer.get(name, name): layer for name, layer in layers.items() if name}


def _find_targets(model: nn.Module, targets: Iterable[str], load=False) -> dict[str, nn.Linear]:
    """Return the linear layers that the targets name. To load, only full names count."""
    names = list(targets) if isinstance(targets, Iterable) and not isinstance(targets, str) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"targets must be a list of layer names, not {names or targets!r}")
    linear = _linear_layers(model)
    found = {}
    for target in names:
        same = [n for n in linear if n == target or (n.endswith(f".{target}") and not load)]
        if not same:
            near = [n for n in linear if n.endswith(f".{target}") or target.endswith(f".{n}")]
            kinds = dict.fromkeys(name.rpartition(".")[2] for name in linear)
            there = ", ".join(near or kinds) or "none"
            raise ValueError(f"no linear layer is {target!r}; there are {there}")
        found |= {name: linear[name] for name in same}
    for name, layer in found.items():
        _refuse_unadaptable(model, name, layer, load)
    return found


def _refuse_wrapped(model: nn.Module) -> None:
    """Raise a ValueError if a wrapper, outside or inside, has put its name into those of layers."""
    inserted = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel
    for name, module in model.named_modules():
        if isinstance(module, wrappers) or inserted & module._modules.keys():
            [inside] = module._modules
            kind = type(module).__name__
            raise ValueError(f"{kind} {name!r} renames the layers: take out its {inside}")


def _refuse_unadaptable(model: nn.Module, name: str, layer: nn.Linear, load: bool) -> None:
    """Raise a ValueError if LoRA in this place would fail later or be passed over in silence."""
    places = [n for n, m in model.named_modules(remove_duplicate=False) if m is layer]
    tensors = [*layer.parameters(), *layer.buffers()]
    is_lost = any(tensor.is_meta for tensor in tensors) and (load or hasattr(layer, "_hf_hook"))
    faults = [
        (len(places) > 1, f"{' and '.join(places)} are one layer"),
        (parametrize.is_parametrized(layer, "weight"), "its weight has a parametrization already"),
        (layer.in_features == 0, "it has no weight before its first forward pass"),  # LazyLinear
        (any(tensor.is_complex() for tensor in tensors), "its weight is complex"),
        (is_lost, "its weight is offloaded, or not loaded"),  # _hf_hook: by accelerate
    ]
    for is_there, fault in faults:
        if is_there:
            raise ValueError(f"{name} cannot have LoRA: {fault}")


def _require_lora(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the model's LoRA layers; raise a ValueError if there are none to work on."""
    layers = lora_layers(model)
    if not layers or "" in layers:  # "": the name of a LoRALinear alone
        raise ValueError("hand over a model that holds LoRALinear layers: call add_lora first")
    return layers


def _refuse_unmergeable(model: nn.Module, layers: dict[str, LoRALinear]) -> None:
    """Raise a ValueError if merging one of the layers would lose or spoil something."""
    named = list(model.named_parameters(remove_duplicate=False))
    for name, layer in layers.items():
        if layer.strength == 0:
            raise ValueError(f"LoRA is off in {name}: set its strength, or call remove_lora")
        weight = dict(layer.base.named_parameters()).get("weight")  # not a computed one
        is_stored = type(weight) is nn.Parameter and not weight.is_meta
        if not is_stored or not weight.is_floating_point() or weight.itemsize == 1:
            raise ValueError(f"{name}.weight is not stored as floats: dequantise or fold it in")
        names = [n for n, p in named if p is weight]  # a tied output head is the embedding, too
        if len(names) > 1:
            raise ValueError(f"merging would change {' and '.join(names)}: they are one")
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"merging would put NaN or infinity into {name}")


# --- Adapter files, in the format of Hugging Face PEFT (notebook 4) -----------------------------

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
TENSOR_NAME = r"base_model\.model\.(.+\.lora_[AB])\.weight"
NOT_PLAIN_LORA = (  # settings that change what is computed, and not the names of the tensors
    "use_rslora use_dora use_qalora fan_in_fan_out rank_pattern alpha_pattern "
    "alora_invocation_tokens layer_replication"
).split()


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of all factors: "fc1.lora_A" (r × in), "fc1.lora_B" (out × r), and so on."""
    factors = _named_factors(_require_lora(model))
    return {name: factor.detach().clone() for name, factor in factors.items()}


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy factors, named as by `lora_state_dict`, into an adapted model."""
    factors = _named_factors(_require_lora(model))
    if any(factor.is_meta for factor in factors.values()):
        raise ValueError("the factors are on the meta device, where no numbers are kept")
    _check_factors(state, factors)
    for name, factor in factors.items():
        factor.copy_(state[name])


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter into a folder that PEFT and `load_adapter` can read.

    Creates the folder, raises an OSError where it cannot, and replaces an adapter that is there.
    All layers must share rank and alpha. The files hold the factors as trained, without strength
    and without what else training may have moved (see `lora_disabled`).

    The files are written whole in a folder `tmp…` inside, then renamed, the weights first. So a
    process that is killed leaves the old adapter, the new one, or two files that `load_adapter`
    refuses. It may leave the folder `tmp…`, too: delete it.
    """
    layers = _require_lora(model)
    ranks_and_alphas = {(layer.rank, layer.alpha) for layer in layers.values()}
    if len(ranks_and_alphas) > 1:
        raise ValueError(f"all layers must share rank and alpha, not {sorted(ranks_and_alphas)}")
    if others := _find_targets(model, layers).keys() - layers.keys():  # "fc" names "b.fc", too
        raise ValueError(f"the names {list(layers)} stand for {sorted(others)} too")
    state = lora_state_dict(model)
    _check_factors(state, _named_factors(layers))
    [(rank, alpha)] = ranks_and_alphas
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(layers)}
    config |= {"lora_dropout": 0.0, "bias": "none", "inference_mode": True}
    # A copy travels with the weights: load_adapter sees whether the two files belong together.
    metadata = {"format": "pt", CONFIG_FILE: json.dumps(config, default=float)}  # NumPy's alpha
    if getattr(model, "name_or_path", ""):  # a model of transformers: for PEFT's Auto classes
        kind = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
        config |= {"base_model_name_or_path": model.name_or_path, "auto_mapping": kind}
    tensors = {f"base_model.model.{n}.weight": f.cpu().contiguous() for n, f in state.items()}
    files = {WEIGHTS_FILE: safetensors.torch.save(tensors, metadata)}
    files[CONFIG_FILE] = json.dumps(config, indent=2, default=float).encode()
    Path(folder).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as ours:  # no other process writes there
        for name, content in files.items():
            Path(ours, name).write_bytes(content)
        for name in files:
            os.replace(Path(ours, name), Path(folder, name))


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Give the model the adapter in a folder, in place of the LoRA layers it has, if any.

    Reads what `save_adapter` wrote, and what PEFT saved for linear layers, without its dropout;
    raises a FileNotFoundError if a file is missing. The names of the tensors say which layers are
    meant. All but LoRA is frozen, as by `add_lora`. No random number is drawn.

    If just these layers have LoRA already, of this rank and alpha, the numbers go into its factors.
    Else the factors are new parameters: an optimizer made before does not train them.
    """
    config, state = _read_adapter(Path(folder))
    rank, alpha = config["r"], config["lora_alpha"]
    names = dict.fromkeys(factor.rpartition(".")[0] for factor in state)
    layers = _find_targets(model, names, load=True)
    # On the meta device nothing is allocated or drawn: first see whether all fits.
    adapted = {name: LoRALinear(base, rank, alpha, "meta") for name, base in layers.items()}
    _check_factors(state, _named_factors(adapted))
    present = lora_layers(model)
    settings = {name: (layer.rank, layer.alpha) for name, layer in present.items()}
    if settings == dict.fromkeys(names, (rank, alpha)):
        load_lora_state_dict(model, state)
        set_lora_strength(model, 1)
    else:
        for name, layer in adapted.items():
            layer.to_empty(device=_device_and_dtype(layers[name])["device"], recurse=False)
        for name, factor in _named_factors(adapted).items():
            factor.copy_(state[name])
        if present:
            remove_lora(model)
        for name, layer in adapted.items():
            model.set_submodule(name, layer)
    freeze_all_but_lora(model)


def _named_factors(layers: dict[str, LoRALinear]) -> dict[str, nn.Parameter]:
    """Return the factors themselves, named as by `lora_state_dict`."""
    factors = {}
    for name, layer in layers.items():
        factors |= {f"{name}.lora_A": layer.lora_A, f"{name}.lora_B": layer.lora_B}
    return factors


def _check_factors(state: dict[str, torch.Tensor], factors: dict[str, nn.Parameter]) -> None:
    """Raise a ValueError unless the state has finite numbers for exactly these factors."""
    if odd := sorted(factors.keys() ^ state.keys()):
        raise ValueError(f"the adapter and the model do not both have {', '.join(odd)}")
    for name, factor in factors.items():
        found = state[name]
        is_whole = type(found) in (torch.Tensor, nn.Parameter) and not found.is_meta
        if not is_whole or not found.is_floating_point():
            raise ValueError(f"{name} must be a whole tensor of floats, not {found!r:.60}")
        if found.shape != factor.shape:
            raise ValueError(f"{name} has shape {tuple(found.shape)}, not {tuple(factor.shape)}")
        if not torch.isfinite(found.to(factor.dtype)).all():
            raise ValueError(f"{name} holds NaN or infinity")


def _read_adapter(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return an adapter's settings, and its factors named as by `lora_state_dict`."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            there = sorted(path.name for path in folder.glob("adapter*")) or "nothing of the kind"
            raise FileNotFoundError(f"no adapter in {folder}: it lacks {name} and has {there}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with safetensors.safe_open(folder / WEIGHTS_FILE, "pt") as file:
            saved_config = dict(json.loads((file.metadata() or {}).get(CONFIG_FILE, "{}")))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (TypeError, ValueError, safetensors.SafetensorError) as error:
        is_pointer = (folder / WEIGHTS_FILE).read_bytes().startswith(b"version https://git-lfs")
        fault = "a git-lfs pointer: run git lfs pull" if is_pointer else f"damaged: {error}"
        raise ValueError(f"an adapter file in {folder} is {fault}") from error
    needed = {"peft_type", "r", "lora_alpha"}
    if not isinstance(config, dict) or needed - config.keys() or config["peft_type"] != "LORA":
        raise ValueError(f"{CONFIG_FILE} in {folder} does not describe a LoRA adapter")
    if saved_config != {name: config.get(name) for name in saved_config}:
        raise ValueError(f"{CONFIG_FILE} in {folder} is not the one saved with {WEIGHTS_FILE}")
    odd = [name for name in NOT_PLAIN_LORA if config.get(name)]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        odd.append("init_lora_weights")  # PiSSA and its like change W₀ too
    names = {name: re.fullmatch(TENSOR_NAME, name) for name in tensors}
    odd += [name for name, match in names.items() if not match]
    if odd or not tensors:
        raise ValueError(f"the adapter in {folder} is not plain LoRA: {odd or 'no factors'}")
    return config, {match[1]: tensors[name] for name, match in names.items()}
