"""The LoRA layers and what you can do with a model that has them, against NumPy and torch."""

import copy
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

import lora_show
import lora_tasks
import lora_utils as lora

OUT, IN, RANK, ALPHA = 5, 7, 3, 6.0


def one_layer(bias=True):
    return nn.Sequential(nn.Linear(IN, OUT, bias=bias, dtype=torch.float64))


def square(count=2):
    return nn.Sequential(OrderedDict((f"fc{i}", nn.Linear(4, 4)) for i in range(count)))


def nested():
    """A model whose layers share a suffix, as the blocks of a transformer do."""
    names = {name: nn.Linear(4, 4) for name in ("fc", "xfc", "fcx")}
    block = nn.ModuleDict({"fc": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    blocks = nn.ModuleList([block, copy.deepcopy(block)])
    return nn.ModuleDict({**names, "blocks": blocks, "relu": nn.ReLU()})


def trained(model, rank=1, alpha=2, targets=("fc0", "fc1")):
    """The model with LoRA, as if it were trained."""
    lora.add_lora(model, rank, alpha, list(targets))
    for layer in lora.lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    return model


def numpy(tensor):
    return tensor.detach().double().numpy()


def test_the_module_is_a_chapter_and_needs_torch_and_safetensors_only():
    heavy = "{'matplotlib', 'IPython', 'torchvision', 'transformers', 'lora_tasks'}"
    script = f"import sys, lora_utils; sys.exit(len({heavy} & sys.modules.keys()))"
    file = Path(lora.__file__)
    subprocess.run([sys.executable, "-c", script], cwd=file.parent, check=True)
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 450


# --- The layers ------------------------------------------------------------------------

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def wide(dtype):
    """The dtype of the factors over a base of this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", FLOATS)
def test_factors_start_as_in_the_paper(dtype):
    factors = lora.LoRAFactors(nn.Linear(400, 500, dtype=dtype), 300, 1)
    A, B = factors.lora_A, factors.lora_B
    assert {name for name, _ in factors.named_parameters()} == {"lora_A", "lora_B"}
    assert "rank=300, alpha=1, strength=1.0" in repr(factors)
    assert A.shape == (300, 400) and B.shape == (500, 300) and A.dtype == B.dtype == wide(dtype)
    assert A.requires_grad and B.requires_grad and B.count_nonzero() == 0
    entries = A.flatten().double() * 400**0.5
    assert abs(entries.mean()) < 0.01
    assert abs(entries.std() - 1) < 0.01
    assert abs((entries**4).mean() - 3) < 0.1  # 3 for a Gaussian, 1.8 for a uniform distribution


@pytest.mark.parametrize("shape", [(IN,), (4, IN), (2, 3, IN)])
@pytest.mark.parametrize(("bias", "strength"), [(True, 1), (False, 1), (True, -0.5), (True, 2.5)])
def test_outputs_and_gradients_are_those_of_numpy(adapt, shape, bias, strength):
    model, x = one_layer(bias), torch.randn(shape).double().requires_grad_()
    weight, b = numpy(model[0].weight), numpy(model[0].bias) if bias else 0
    [factors] = adapt(model, RANK, ALPHA, ["0"])
    lora.set_lora_strength(model, strength)
    A, B, s = numpy(factors.lora_A), numpy(factors.lora_B), strength * ALPHA / RANK
    h, g = model(x), torch.randn(*shape[:-1], OUT).double()
    h.backward(g)
    dW = s * numpy(g).reshape(-1, OUT).T @ numpy(x).reshape(-1, IN)
    exactly = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(numpy(factors.delta_W()), s * B @ A, **exactly)
    np.testing.assert_allclose(numpy(h), numpy(x) @ (weight + s * B @ A).T + b, **exactly)
    np.testing.assert_allclose(x.grad, numpy(g) @ (weight + s * B @ A), **exactly)
    np.testing.assert_allclose(factors.lora_A.grad, B.T @ dW, **exactly)
    np.testing.assert_allclose(factors.lora_B.grad, dW @ A.T, **exactly)
    assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_is_made_on_the_cpu_by_accident(adapt, dtype):
    with torch.device("meta"):
        model = lora_tasks.RichBoyNet().to(dtype)
    adapt(model, 2, 4, ["fc1", "fc2", "fc3"])
    logits = model(torch.empty(3, 28, 28, dtype=dtype, device="meta"))
    assert logits.shape == (3, 10) and logits.dtype == dtype and logits.is_meta
    logits.sum().backward()
    assert all(p.is_meta for p in model.parameters())
    assert all(
        p.dtype == (wide(dtype) if "lora_" in n else dtype) for n, p in model.named_parameters()
    )


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_base_trains_with_a_scaler(dtype, autocast):
    model = trained(square(1).to(dtype), targets=["fc0"])
    before = lora.lora_state_dict(model)
    optimizer = torch.optim.Adam(lora.lora_layers(model)["fc0"].parameters(recurse=False))
    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = model(torch.ones(2, 4, dtype=dtype))
    scaler.scale(out.float().square().mean()).backward()
    scaler.step(optimizer)
    assert out.dtype == dtype
    assert not any(torch.equal(t, before[n]) for n, t in lora.lora_state_dict(model).items())


def test_a_sum_with_a_16_bit_weight_is_rounded_once(adapt):
    model = nn.Sequential(nn.Linear(IN, OUT, dtype=torch.bfloat16))
    W0 = model[0].weight.detach().clone()
    [factors] = adapt(model, RANK, ALPHA, ["0"])
    expected = (W0.float() + factors.delta_W()).bfloat16()
    assert torch.equal(model[0].weight, expected)
    if isinstance(factors, lora.LoRALinear):
        lora.merge_lora(model)
        assert torch.equal(model[0].weight, expected) and model[0].weight.dtype == torch.bfloat16


def test_a_layer_with_lora_reads_as_a_linear_layer():
    layer = trained(one_layer(), targets=["0"])[0]
    assert (layer.in_features, layer.out_features, layer.bias) == (IN, OUT, layer.base.bias)
    assert {*layer.state_dict()} == {"lora_A", "lora_B", "base.weight", "base.bias"}
    x = torch.randn(2, IN).double()
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
    (layer.weight * torch.randn(OUT, IN)).sum().backward()
    assert layer.lora_A.grad.count_nonzero() and layer.lora_B.grad.count_nonzero()
    layer.strength = 0
    assert layer.weight is layer.base.weight
    layer.strength, layer.base.weight = 1, WHOLE
    assert not hasattr(layer, "weight")  # packed numbers are no weight


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_modules_that_read_the_weight_and_do_not_call_the_layer_get_lora(training, gradients):
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=True).train(training)
    x, base = torch.randn(2, 3, 4), copy.deepcopy(model).requires_grad_(False)
    trained(model, 2, 4, ["out_proj", "linear1", "linear2"])
    merged = copy.deepcopy(model)
    lora.merge_lora(merged)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(model(x), merged(x))
        assert not torch.allclose(model(x), base(x), atol=1e-2)
        with lora.lora_disabled(model):
            assert torch.equal(model(x), base(x))
    if gradients:
        model(x).square().sum().backward()
        assert all(layer.lora_A.grad.any() for layer in lora.lora_layers(model).values())


def test_further_arguments_go_to_the_base():
    class Scaled(nn.Linear):
        def forward(self, x, scale=1.0, shift=0.0):
            return super().forward(x) * scale + shift

    model, x = nn.Sequential(OrderedDict(fc0=Scaled(4, 4))), torch.randn(2, 4)
    expected = model.fc0(x, 2.0, shift=1.0) + 0
    trained(model, targets=["fc0"])
    torch.testing.assert_close(model.fc0(x, 2.0, shift=1.0), expected + x @ model.fc0.delta_W().T)


class Shapes(TorchDispatchMode):
    """Note the shape of each result that is no view."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen = getattr(self, "seen", []) + [None if func.is_view else result.shape]
        return result


def test_the_branch_never_builds_a_matrix_of_the_size_of_W():
    model, x = trained(one_layer(), targets=["0"]), torch.randn(4, IN).double()
    with Shapes() as shapes:
        model(x).square().sum().backward()
    assert (4, OUT) in shapes.seen and not {(OUT, IN), (IN, OUT)} & {*shapes.seen}


# --- Adding ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (["fc"], ["fc", "blocks.0.fc", "blocks.1.fc"]),
        (["0.fc"], ["blocks.0.fc"]),
        (["xfc", "fcx"], ["xfc", "fcx"]),
        (["blocks.0.fc", "fc"], ["fc", "blocks.0.fc", "blocks.1.fc"]),
        (["fcx", "fcx"], ["fcx"]),
    ],
)
def test_a_target_is_a_full_name_or_ends_in_a_dot_and_the_target(targets, adapted):
    model = nested()
    before = dict(model.named_parameters())
    lora.add_lora(model, 1, 1, iter(targets))
    assert list(lora.lora_layers(model)) == adapted
    after = dict(model.named_parameters())
    trains = {name for name, p in after.items() if p.requires_grad}
    assert trains == {f"{name}.lora_{factor}" for name in adapted for factor in "AB"}
    frozen = {n.replace(".base.", "."): p for n, p in after.items() if n not in trains}
    assert frozen.keys() == before.keys() and all(frozen[n] is before[n] for n in before)
    assert len({tuple(after[f"{name}.lora_A"].flatten().tolist()) for name in adapted}) == len(
        adapted
    )


BAD = [[name] for name in ("nope", "c", "relu", "blocks.0", "base", "", None, 0)]  # base of xfc


@pytest.mark.parametrize("targets", [*BAD, ["fc", "nope"], ["fc", 0], [], "fc", None])
def test_bad_targets_are_named(refused, targets):
    bad = repr(targets[-1] if isinstance(targets, list) and targets else targets)
    with refused(trained(model := nested(), targets=["xfc"]), bad):
        lora.add_lora(model, 1, 1, targets)


def test_a_name_that_is_not_there_is_answered_with_those_that_are(refused):
    near = {"nope": "fc, xfc, fcx", "model.blocks.0.fc": "fc, blocks.0.fc"}
    for name, there in near.items():
        with refused(model := nested(), f"there are {there}"):
            lora.add_lora(model, 1, 1, [name])
    with pytest.raises(ValueError, match="there are none$"):
        lora.add_lora(nn.Linear(4, 4), 1, 1, ["fc"])


@pytest.mark.parametrize("rank", [0, -1, 2.0, "2", None, True])
def test_bad_ranks_are_named(refused, rank):
    model = square()
    with refused(model, "rank", "whole number above 0", repr(rank)):
        lora.add_lora(model, rank, 1, ["fc0", "fc1"])
    for form in (lora.LoRALinear, lora.LoRAParametrization):
        with refused(model, repr(rank)):
            form(model[1], rank, 1)


NO_NUMBERS = [float("inf"), -float("inf"), float("nan"), 10**400, 1e39, "1", None, 1j, True]


@pytest.mark.parametrize("number", [*NO_NUMBERS, 0, -1])
def test_bad_alphas_and_strengths_are_named(adapt, refused, number):
    with refused(model := square(), "alpha", "a number above 0", repr(number)):
        lora.add_lora(model, 1, number, ["fc0"])
    if number in NO_NUMBERS:
        adapt(model, 1, 1, ["fc0"])
        with refused(model, "strength", repr(number)):
            lora.set_lora_strength(model, number)


def test_numbers_of_numpy_are_numbers(tmp_path):
    model, twin = square(), square()
    lora.add_lora(model, np.int64(4), np.float32(2), ["fc0", "fc1"])
    lora.set_lora_strength(model, np.float32(0.5))
    assert model.fc0.scaling == 0.25
    lora.set_lora_strength(model, 2)  # torch.compile would compile anew for each whole number
    assert type(model.fc0.strength) is float
    lora.save_adapter(model, tmp_path)
    lora.load_adapter(twin, tmp_path)
    assert (twin.fc0.rank, twin.fc0.alpha, twin.fc0.strength) == (4, 2, 1)


UNADAPTABLE = {
    "parametrization already": nn.utils.parametrizations.weight_norm,
    "first forward pass": lambda layer: nn.LazyLinear(4),
    "complex": lambda layer: layer.to(torch.complex64),
}


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("fault", UNADAPTABLE)
def test_layers_where_lora_would_fail_are_refused(unchanged, tmp_path, fault):
    lora.save_adapter(trained(square(), targets=["fc0", "fc1"]), tmp_path)
    model = square()
    model.fc1 = UNADAPTABLE[fault](model.fc1)
    calls = (lora.add_lora, 1, 1, ["fc0", "fc1"]), (lora.load_adapter, tmp_path)
    for call, *arguments in calls:
        with unchanged(model.fc0), pytest.raises(ValueError, match=f"fc1 cannot .*{fault}"):
            call(model, *arguments)
        assert type(model.fc0) is nn.Linear


def test_batchnorm_that_does_not_move_leaves_the_base_bit_for_bit():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x, base = 3 * torch.randn(9, 4) + 1, copy.deepcopy(model.eval())
    lora.add_lora(model, 2, 4, ["0", "2"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()[1].eval()  # as the docstring of lora_disabled advises
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    with lora.lora_disabled(model.eval()):
        assert torch.equal(model(x), base(x))
    assert not torch.equal(model(x), base(x))


def test_a_layer_in_two_places_and_one_with_lora_are_refused(refused):
    with refused(trained(model := square(), targets=["fc1"]), "['fc1'] have LoRA already"):
        lora.add_lora(model, 1, 1, ["fc0", "fc1"])
    model.fc1 = model.fc0  # set_submodule would put LoRA into one of the two places
    with refused(model, "fc0 and fc1 are one layer"):
        lora.add_lora(model, 1, 1, ["fc0"])


def distributed(model):
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)  # without the group of processes that its own __init__ needs
    wrapped.module = model
    return wrapped


WRAPPERS = {
    "_orig_mod": [torch.compile],
    "module": [distributed, nn.DataParallel, AveragedModel],
    "_checkpoint_wrapped_module": [checkpoint_wrapper],
}


@pytest.mark.parametrize("inside", WRAPPERS)
def test_wrapped_models_are_refused_with_the_way_out(refused, tmp_path, inside):
    lora.save_adapter(trained(square()), tmp_path / "saved")
    calls = [[call] for call in (lora.merge_lora, lora.remove_lora, lora.lora_state_dict)]
    calls += [[lora.add_lora, 1, 1, ["fc0"]], [lora.load_adapter, tmp_path / "saved"]]
    calls += [[lora.save_adapter, tmp_path / "new"]]
    for wrap in WRAPPERS[inside]:
        plain = nn.Sequential(OrderedDict(fc0=nn.Linear(4, 4), fc1=wrap(square())))
        adapted = trained(square())
        adapted.fc1 = wrap(adapted.fc1)
        for model in (wrap(square()), wrap(trained(square())), plain, adapted):
            for call, *arguments in calls:
                with refused(model, type(plain.fc1).__name__, f"its {inside}"):
                    call(model, *arguments)
    assert not (tmp_path / "new").exists()


# --- Strength --------------------------------------------------------------------------


def test_strength_zero_is_the_base_bit_for_bit(adapt):
    model, x = one_layer(), torch.randn(4, IN).double().requires_grad_()
    before = model(x)
    [factors] = adapt(model, RANK, ALPHA, ["0"])
    factors.lora_B.data.fill_(torch.inf)  # 0·∞ would give NaN
    lora.set_lora_strength(model, 0)
    assert torch.equal(model(x), before) and model(x).requires_grad
    lora.set_lora_strength(model, 0.5)
    assert factors.strength == 0.5


def test_disabled_is_the_base_and_ends_where_it_began(adapt):
    model, x = square(3), torch.randn(5, 4)
    base = model(x)
    first, second = adapt(model, 2, 4, ["fc0", "fc2"])
    first.strength, second.strength = 0.5, -2.0
    adapted = model(x)
    with pytest.raises(KeyError), lora.lora_disabled(model):
        with lora.lora_disabled(model):
            pass
        assert torch.equal(model(x), base)
        raise KeyError
    assert (first.strength, second.strength) == (0.5, -2.0)
    assert torch.equal(model(x), adapted) and not torch.equal(adapted, base)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (lora.merge_lora, []),
        (lora.remove_lora, []),
        (lora.lora_state_dict, []),
        (lora.load_lora_state_dict, [{}]),
        (lora.save_adapter, ["new"]),
        (lora.set_lora_strength, [1]),
        (lambda model: lora.lora_disabled(model).__enter__(), []),
    ],
)
def test_without_lora_there_is_nothing_to_do(refused, monkeypatch, tmp_path, call, arguments):
    monkeypatch.chdir(tmp_path)
    lora.merge_lora(model := trained(square()))
    with refused(model, "add_lora"):
        call(model, *arguments)
    assert not list(tmp_path.iterdir())
    alone = lora.LoRALinear(nn.Linear(4, 4), 1, 1)
    if call in (lora.merge_lora, lora.remove_lora):
        with refused(alone, "a model that holds"):
            call(alone)


# --- Merging and removing --------------------------------------------------------------


def test_merge_adds_the_update_once_at_the_present_strength():
    model = nested().double()
    expected, modules = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    trained(model, 2, 3, ["xfc", "blocks.1.fc"])
    lora.set_lora_strength(model, 0.5)
    for name, layer in lora.lora_layers(model).items():
        expected[f"{name}.weight"] += 0.75 * (layer.lora_B @ layer.lora_A).detach()
    lora.merge_lora(model)
    torch.testing.assert_close(model.state_dict(), expected)
    assert [type(m) for m in model.modules()] == modules
    assert not any(p.requires_grad for p in model.parameters())
    lora.add_lora(model, 1, 1, ["xfc"])  # a new start


def test_remove_gives_back_the_very_weights_bit_for_bit():
    model, x = nested(), torch.randn(2, 4)
    before, bits = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    trained(model, 2, 3, ["xfc", "blocks.1.fc"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model["blocks"][1]["fc"](model["xfc"](x)).square().sum().backward()
    optimizer.step()
    lora.set_lora_strength(model, 0.5)
    model["alias"] = model["xfc"]
    lora.remove_lora(model)
    assert model.pop("alias") is model["xfc"]
    assert lora.lora_layers(model) == {} and type(model["xfc"]) is nn.Linear
    assert all(p is before[name] for name, p in model.named_parameters())
    assert lora_show.same_tensors(model.state_dict(), bits)


class Quantised(nn.Linear):
    """As in 4- and 8-bit libraries: codes and scales are stored, the weight is computed."""

    def __init__(self, layer):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias, weight = None, layer.weight.detach()
        self.register_buffer("codes", (weight / weight.abs().max() * 127 + 128).byte())
        self.register_buffer("scale", weight.abs().max() / 127)

    @property
    def weight(self):
        return (self.codes.to(self.scale.dtype) - 128) * self.scale


def overflow(state):
    """Weights and an update that are finite, with a sum that is not."""
    sizes = {"lora_A": 1e19, "lora_B": 1e19, "base.weight": 3e38, "base.bias": 0}
    return {name: torch.full_like(tensor, sizes[name]) for name, tensor in state.items()}


WHOLE, WHOLE_32 = (
    nn.Parameter(torch.ones(4, 4, dtype=dtype), requires_grad=False)
    for dtype in (torch.int8, torch.int32)
)


class Special(torch.Tensor):
    """A tensor with a type of its own, as DTensor and torchao have."""


def special(parameter):
    return nn.Parameter(parameter.detach().as_subclass(Special))


def float8(layer):
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)


FAULTS = [
    (lambda m: setattr(m.head, "weight", m.fc1.base.weight), ["fc1", "head.weight"]),
    (lambda m: setattr(m.fc0.base, "weight", m.fc1.base.weight), ["fc0", "fc1"]),
    (lambda m: setattr(m.fc1, "strength", 0), ["fc1", "off"]),
    (lambda m: setattr(m.fc1.base, "weight", WHOLE), ["fc1", "dequantise"]),
    (lambda m: setattr(m.fc1.base, "weight", WHOLE_32), ["fc1", "dequantise"]),
    (lambda m: setattr(m.fc1, "base", Quantised(m.fc1.base)), ["fc1", "dequantise"]),
    (lambda m: setattr(m.fc1.base, "weight", special(m.fc1.base.weight)), ["fc1", "floats"]),
    (lambda m: float8(m.fc1.base), ["fc1", "floats"]),
    (lambda m: m.fc1.to("meta"), ["fc1", "floats"]),
    (lambda m: nn.utils.weight_norm(m.fc1.base), ["fc1", "fold it in"]),
    (lambda m: prune.l1_unstructured(m.fc1.base, "weight", 0.5), ["fc1", "fold it in"]),
    (lambda m: m.fc1.lora_A.data.fill_(torch.nan), ["fc1", "NaN"]),
    (lambda m: m.fc1.lora_A.data.fill_(torch.inf), ["fc1", "NaN"]),
    (lambda m: m.fc1.load_state_dict(overflow(m.fc1.state_dict())), ["fc1", "infinity"]),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(("fault", "named"), FAULTS)
def test_a_merge_that_would_do_harm_is_refused(refused, fault, named):
    model = square()
    model.head = nn.Linear(4, 4, bias=False)
    fault(trained(model))
    with refused(model, *named):
        lora.merge_lora(model)


def four_bits(layer, dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=dtype)
    packed.load_state_dict(layer.state_dict())
    return packed.to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [four_bits, lambda layer, dtype: Quantised(layer.to(dtype))])
def test_lora_trains_over_a_packed_weight(kind, dtype):
    x, layer = torch.randn(3, 64, dtype=dtype), kind(nn.Linear(64, 64, bias=False), dtype)
    model = nn.Sequential(OrderedDict(fc0=layer))
    before = model(x)
    assert lora.count_parameters(model) == (64 * 64, 0)
    trained(model, 2, 4, ["fc0"])
    assert lora.count_parameters(model) == (64 * 64 + 2 * 128, 2 * 128)
    update = x.float() @ model.fc0.delta_W().T
    torch.testing.assert_close(model(x).float(), before.float() + update, rtol=0.02, atol=0.05)
    model(x).sum().backward()
    assert model.fc0.lora_A.grad.any() and model.fc0.lora_A.dtype == torch.float32
    assert model(x).dtype == dtype and hasattr(model.fc0, "weight") == (kind is not four_bits)
    lora.remove_lora(model)
    assert model.fc0 is layer and torch.equal(model(x), before)


def test_freezing_spares_the_factors_and_nothing_else(adapt):
    model = one_layer()
    adapt(model, 1, 1, ["0"])
    model.requires_grad_(True)
    lora.freeze_all_but_lora(model)
    trains = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"lora_A", "lora_B"}
    lora.freeze_all_but_lora(alone := lora.LoRALinear(nn.Linear(IN, OUT), RANK, ALPHA))
    assert alone.lora_A.requires_grad and not alone.base.bias.requires_grad


# --- Counting ---------------------------------------------------------------------------


def test_parameters_are_counted_as_by_the_formula(adapt):
    model, tied = lora_tasks.RichBoyNet(), square()
    assert lora.count_parameters(model) == (2_807_010, 2_807_010)
    adapt(model, 1, 1, ["fc1", "fc2", "fc3"])
    assert lora.count_parameters(model).total == 2_813_804
    assert lora.count_parameters(model).trainable == 784 + 1000 + 1000 + 2000 + 2000 + 10
    tied.fc1.weight = tied.fc0.weight
    assert lora.count_parameters(tied) == (24, 24)
    assert lora.count_parameters(nn.Linear(4, 5)) == (25, 25)
    packed = Quantised(nn.Linear(4, 5))
    packed.bias = nn.Parameter(torch.ones(5))
    assert lora.count_parameters(packed) == (25, 5)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))  # 5 lengths, and directions
    assert lora.count_parameters(normed) == (5 + 20 + 5, 30)
