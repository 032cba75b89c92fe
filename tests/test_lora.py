"""The LoRA core against NumPy, closed forms and torch itself."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from lora_utils import (
    LoRAFactors,
    LoRALinear,
    LoRAParametrization,
    RichBoyNet,
    add_lora,
    count_parameters,
    lora_disabled,
    lora_layers,
    lora_state_dict,
    merge_lora,
    pick_device,
    remove_lora,
    save_adapter,
    set_lora_strength,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float64]
OUT, IN, RANK, ALPHA = 5, 7, 3, 6.0


def one_layer(dtype=torch.float64, bias=True):
    return nn.Sequential(nn.Linear(IN, OUT, bias=bias, dtype=dtype))


def nested():
    """A model whose layers share a suffix, as the blocks of a transformer do."""
    block = nn.ModuleDict({"fc": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    return nn.ModuleDict(
        {
            "fc": nn.Linear(4, 4),
            "xfc": nn.Linear(4, 4),
            "fcx": nn.Linear(4, 4),
            "blocks": nn.ModuleList([block, copy.deepcopy(block)]),
            "relu": nn.ReLU(),
        }
    )


def numpy(tensor):
    return tensor.detach().double().numpy()


def formula(x, weight, bias, layer, scaling):
    """h = W₀x + b + scaling·B·A·x, in NumPy."""
    update = scaling * numpy(layer.lora_B) @ numpy(layer.lora_A)
    return numpy(x) @ (numpy(weight) + update).T + (0 if bias is None else numpy(bias))


# --- The factors -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_factors_have_the_shapes_of_the_paper(dtype):
    factors = LoRAFactors(torch.empty(OUT, IN, dtype=dtype), RANK, ALPHA)
    assert factors.lora_A.shape == (RANK, IN) and factors.lora_B.shape == (OUT, RANK)
    assert factors.lora_A.dtype == factors.lora_B.dtype == dtype
    assert factors.lora_A.requires_grad and factors.lora_B.requires_grad
    assert set(dict(factors.named_parameters())) == {"lora_A", "lora_B"}


def test_A_starts_gaussian_with_std_one_over_sqrt_in():
    entries = LoRAFactors(torch.empty(500, 400), 300, 1).lora_A.flatten() * 400**0.5
    assert abs(entries.mean()) < 0.01
    assert abs(entries.std() - 1) < 0.01
    assert abs((entries**4).mean() - 3) < 0.1  # 3 for a Gaussian, 1.8 for a uniform distribution


def test_B_starts_at_zero():
    assert LoRAFactors(torch.ones(OUT, IN), RANK, ALPHA).lora_B.count_nonzero() == 0


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1), (2, 8), (4, 2), (5, 0.5)])
def test_scaling_is_alpha_over_rank_times_strength(rank, alpha):
    factors = LoRAFactors(torch.ones(OUT, IN), rank, alpha)
    assert factors.scaling == alpha / rank
    factors.strength = 0.25
    assert factors.scaling == 0.25 * alpha / rank


@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_is_made_on_the_cpu_by_accident(adapt, dtype):
    with torch.device("meta"):
        model = RichBoyNet().to(dtype)
    adapt(model, 2, 4, ["fc1", "fc2", "fc3"])
    logits = model(torch.empty(3, 28, 28, dtype=dtype, device="meta"))
    assert logits.shape == (3, 10) and logits.dtype == dtype and logits.is_meta
    assert all(parameter.is_meta for parameter in model.parameters())
    logits.sum().backward()
    merge_lora(model)
    assert all(parameter.is_meta for parameter in model.parameters())


# --- What a layer computes -------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(IN,), (4, IN), (2, 3, IN)])
def test_output_is_the_formula_of_the_paper(adapt, shape, bias):
    model, x = one_layer(bias=bias), torch.randn(shape, dtype=torch.float64)
    weight, b = model[0].weight.detach().clone(), model[0].bias
    adapt(model, RANK, ALPHA, ["0"])
    expected = formula(x, weight, b, lora_layers(model)["0"], ALPHA / RANK)
    np.testing.assert_allclose(numpy(model(x)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_output_keeps_the_dtype(adapt, dtype, tolerance):
    model, x = one_layer(dtype), torch.randn(4, IN, dtype=dtype)
    weight, bias = model[0].weight.detach().clone(), model[0].bias
    adapt(model, RANK, ALPHA, ["0"])
    expected = formula(x, weight, bias, lora_layers(model)["0"], ALPHA / RANK)
    assert model(x).dtype == dtype
    np.testing.assert_allclose(numpy(model(x)), expected, rtol=tolerance, atol=tolerance)


def test_parametrized_weight_is_W0_plus_update():
    layer = nn.Linear(IN, OUT, dtype=torch.float64)
    weight = layer.weight.detach().clone()
    factors = LoRAParametrization(layer.weight, RANK, ALPHA)
    nn.init.normal_(factors.lora_B)
    parametrize.register_parametrization(layer, "weight", factors)
    expected = numpy(weight) + ALPHA / RANK * numpy(factors.lora_B) @ numpy(factors.lora_A)
    np.testing.assert_allclose(numpy(layer.weight), expected, rtol=1e-12)
    assert torch.equal(layer.parametrizations.weight.original, weight)


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_gradients_are_those_of_the_closed_form(adapt, strength):
    model, x, g = one_layer(), torch.randn(4, IN).double(), torch.randn(4, OUT).double()
    adapt(model, RANK, ALPHA, ["0"])
    set_lora_strength(model, strength)
    layer = lora_layers(model)["0"]
    model(x).backward(g)
    dW = strength * ALPHA / RANK * numpy(g).T @ numpy(x)
    np.testing.assert_allclose(layer.lora_A.grad, numpy(layer.lora_B).T @ dW, rtol=1e-12)
    np.testing.assert_allclose(layer.lora_B.grad, dW @ numpy(layer.lora_A).T, rtol=1e-12)


def test_gradient_of_the_input_flows_through_both_branches(adapt):
    model, x = one_layer(), torch.randn(4, IN).double().requires_grad_()
    weight = model[0].weight.detach().clone()
    layer = lora_layers(adapt(model, RANK, ALPHA, ["0"]))["0"]
    model(x).backward(g := torch.randn(4, OUT).double())
    adapted = numpy(weight) + ALPHA / RANK * numpy(layer.lora_B) @ numpy(layer.lora_A)
    np.testing.assert_allclose(x.grad, numpy(g) @ adapted, rtol=1e-12, atol=1e-12)


def test_both_forms_agree_in_output_and_gradients():
    branch = one_layer()
    parametrized = copy.deepcopy(branch)
    add_lora(branch, RANK, ALPHA, ["0"])
    nn.init.normal_(branch[0].lora_B)
    factors = LoRAParametrization(parametrized[0].weight, RANK, ALPHA)
    factors.load_state_dict({n: p for n, p in branch[0].state_dict().items() if "lora" in n})
    parametrize.register_parametrization(parametrized[0], "weight", factors)
    x = torch.randn(4, IN).double()
    torch.testing.assert_close(branch(x), parametrized(x))
    for model in (branch, parametrized):
        model(x).square().sum().backward()
    torch.testing.assert_close(branch[0].lora_A.grad, factors.lora_A.grad)
    torch.testing.assert_close(branch[0].lora_B.grad, factors.lora_B.grad)


def test_first_gradient_of_A_is_zero_and_that_of_B_is_not(adapt):
    model = adapt(one_layer(), RANK, ALPHA, ["0"])
    layer = lora_layers(model)["0"]
    nn.init.zeros_(layer.lora_B)
    model(torch.randn(4, IN).double()).square().sum().backward()
    assert layer.lora_A.grad.count_nonzero() == 0
    assert layer.lora_B.grad.count_nonzero() == layer.lora_B.numel()


def test_frozen_weights_get_no_gradient(adapt):
    model = adapt(one_layer(), RANK, ALPHA, ["0"])
    model(torch.randn(4, IN).double()).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 2 and all("lora_" in name for name in trained)


class Shapes(TorchDispatchMode):
    """Note the shape of each tensor that any operation makes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.seen.add(tuple(result.shape))
        return result


def test_branch_form_never_builds_a_matrix_of_the_size_of_W():
    model, x = one_layer(), torch.randn(4, IN).double()
    add_lora(model, RANK, ALPHA, ["0"])
    with Shapes() as shapes:
        shapes.seen = set()
        model(x).square().sum().backward()
    assert (4, OUT) in shapes.seen
    assert not {(OUT, IN), (IN, OUT)} & shapes.seen


# --- Adding ----------------------------------------------------------------------------


def test_add_lora_freezes_everything_but_the_factors():
    model = nested()
    add_lora(model, 2, 4, ["fc"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = ("fc", "blocks.0.fc", "blocks.1.fc")
    assert trained == {f"{name}.lora_{factor}" for name in layers for factor in "AB"}


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (["fc"], ["fc", "blocks.0.fc", "blocks.1.fc"]),
        (["0.fc"], ["blocks.0.fc"]),
        (["blocks.1.fc"], ["blocks.1.fc"]),
        (["xfc", "fcx"], ["xfc", "fcx"]),
        (["blocks.0.fc", "fc"], ["fc", "blocks.0.fc", "blocks.1.fc"]),
        (["fcx", "fcx"], ["fcx"]),
    ],
)
def test_a_target_is_a_full_name_or_ends_in_a_dot_and_the_target(targets, adapted):
    model = nested()
    add_lora(model, 1, 1, targets)
    assert list(lora_layers(model)) == adapted
    assert {name for name, m in model.named_modules() if isinstance(m, LoRALinear)} == set(adapted)


def test_adapted_layers_keep_their_very_weights():
    model = nested()
    before = dict(model.named_parameters())
    add_lora(model, 1, 1, ["fc"])
    assert model["blocks"][0]["fc"].base.weight is before["blocks.0.fc.weight"]
    assert model["blocks"][0]["fc"].base.bias is before["blocks.0.fc.bias"]


def test_adding_lora_changes_no_output():
    model, images = RichBoyNet(), torch.randn(3, 28, 28)
    before = model(images)
    add_lora(model, 4, 8, ["fc1", "fc2", "fc3"])
    assert torch.equal(model(images), before)


def test_layers_of_one_model_have_factors_of_their_own():
    model = nested()
    add_lora(model, 2, 4, ["fc"])
    first, second = lora_layers(model)["blocks.0.fc"], lora_layers(model)["blocks.1.fc"]
    assert not torch.equal(first.lora_A, second.lora_A)


def test_a_further_layer_can_be_adapted_later():
    model = nested()
    add_lora(model, 2, 4, ["xfc"])
    add_lora(model, 1, 4, ["fcx"])
    assert [layer.rank for layer in lora_layers(model).values()] == [2, 1]


def test_lora_layers_sees_only_lora():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    assert lora_layers(model) == {}
    layer = model[1]
    factors = LoRAParametrization(layer.weight, 1, 1)
    parametrize.register_parametrization(layer, "weight", factors)
    assert lora_layers(model) == {"1": factors}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["nope"], "'nope'; there are fc, xfc, fcx, blocks.0.fc, blocks.1.fc"),
        (["fc", "nope"], "'nope'"),
        (["c"], "'c'"),
        (["relu"], "'relu'"),
        (["blocks.0.norm"], "'blocks.0.norm'"),
        (["blocks.0"], "'blocks.0'"),
        ([None], "None"),
        ([], "must be a list"),
        ("fc", "must be a list"),
        (None, "must be a list"),
    ],
)
def test_bad_targets_are_named(unchanged, targets, message):
    model = nested()
    with unchanged(model), pytest.raises(ValueError, match=message):
        add_lora(model, 1, 1, targets)


@pytest.mark.parametrize("rank", [0, -1, 11, 2.0, "2", None, True])
def test_bad_ranks_are_named(unchanged, rank):
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 10))
    with unchanged(model), pytest.raises(ValueError, match=f"rank .* not {rank!r}"):
        add_lora(model, rank, 1, ["0", "1"])
    with pytest.raises(ValueError, match="1 to 10 for a weight of shape \\(10, 20\\)"):
        LoRAParametrization(model[1].weight, rank, 1)
    with unchanged(model), pytest.raises(ValueError, match="rank"):
        LoRALinear(model[1], rank, 1)


@pytest.mark.parametrize("alpha", [0, -1, float("inf"), float("nan"), "1", None])
def test_bad_alphas_are_named(unchanged, alpha):
    model = one_layer()
    with unchanged(model), pytest.raises(ValueError, match=f"alpha .* not {alpha!r}"):
        add_lora(model, 1, alpha, ["0"])
    with pytest.raises(ValueError, match="alpha"):
        LoRAParametrization(model[0].weight, 1, alpha)


def test_the_largest_rank_is_allowed():
    assert LoRAFactors(torch.ones(OUT, IN), min(OUT, IN), 1).rank == min(OUT, IN)


@pytest.mark.parametrize("shape", [(3,), (3, 3, 3)])
def test_only_a_matrix_can_be_adapted(shape):
    with pytest.raises(ValueError, match="2 dimensions"):
        LoRAParametrization(torch.ones(shape), 1, 1)


def test_a_layer_cannot_be_adapted_twice(adapt, unchanged):
    model = adapt(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), 1, 1, ["1"])
    with unchanged(model), pytest.raises(ValueError, match="1 already has LoRA"):
        add_lora(model, 1, 1, ["0", "1"])


def test_a_layer_with_another_parametrization_is_refused(unchanged):
    model = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with unchanged(model), pytest.raises(ValueError, match="weight of 1 has a parametrization"):
        add_lora(model, 1, 1, ["0", "1"])


def test_the_frozen_layer_inside_a_branch_is_no_target(unchanged):
    model = nested()
    add_lora(model, 1, 1, ["xfc"])
    with unchanged(model), pytest.raises(ValueError, match="'base'; there are fc, xfc, fcx, bl"):
        add_lora(model, 1, 1, ["base"])


# --- Strength --------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, 1.5, -1, 1e-3])
def test_strength_scales_the_update(adapt, strength):
    model, x = one_layer(), torch.randn(4, IN).double()
    weight, bias = model[0].weight.detach().clone(), model[0].bias
    adapt(model, RANK, ALPHA, ["0"])
    set_lora_strength(model, strength)
    expected = formula(x, weight, bias, lora_layers(model)["0"], strength * ALPHA / RANK)
    np.testing.assert_allclose(numpy(model(x)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strength_zero_is_the_base_bit_for_bit(adapt, dtype):
    model, x = one_layer(dtype), torch.randn(4, IN, dtype=dtype)
    before = model(x).detach()
    adapt(model, RANK, ALPHA, ["0"])
    lora_layers(model)["0"].lora_B.data.fill_(torch.inf)  # 0·∞ would give nan
    set_lora_strength(model, 0)
    assert torch.equal(model(x), before)


def test_strength_reaches_every_layer(adapt):
    model = adapt(RichBoyNet(), 1, 1, ["fc1", "fc2", "fc3"])
    set_lora_strength(model, 0.3)
    assert [layer.strength for layer in lora_layers(model).values()] == [0.3] * 3


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf"), "1", None])
def test_bad_strengths_are_named(adapt, unchanged, strength):
    model = adapt(one_layer(), RANK, ALPHA, ["0"])
    with unchanged(model), pytest.raises(ValueError, match=f"strength .* not {strength!r}"):
        set_lora_strength(model, strength)


def test_disabled_is_the_base_bit_for_bit_and_ends_where_it_began(adapt):
    model, images = RichBoyNet(), torch.randn(3, 28, 28)
    base = model(images)
    adapt(model, 2, 4, ["fc1", "fc3"])
    adapted = model(images)
    with lora_disabled(model):
        assert torch.equal(model(images), base)
    assert torch.equal(model(images), adapted)
    assert not torch.equal(adapted, base)


def test_disabled_restores_the_strength_of_each_layer(adapt):
    model = adapt(RichBoyNet(), 1, 1, ["fc1", "fc2"])
    layers = lora_layers(model)
    layers["fc1"].strength, layers["fc2"].strength = 0.5, -2.0
    with lora_disabled(model):
        assert [layer.strength for layer in layers.values()] == [0, 0]
    assert [layer.strength for layer in layers.values()] == [0.5, -2.0]


def test_disabled_nests(adapt):
    model = adapt(one_layer(), RANK, ALPHA, ["0"])
    layer = lora_layers(model)["0"]
    with lora_disabled(model):
        with lora_disabled(model):
            assert layer.strength == 0
        assert layer.strength == 0
    assert layer.strength == 1


def test_disabled_restores_after_an_exception(adapt):
    model = adapt(one_layer(), RANK, ALPHA, ["0"])
    with pytest.raises(KeyError), lora_disabled(model):
        raise KeyError
    assert lora_layers(model)["0"].strength == 1


# --- Merging and removing --------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_merge_adds_the_update_once_at_the_present_strength(adapt, strength):
    model, x = one_layer(), torch.randn(4, IN).double()
    weight, bias = model[0].weight.detach().clone(), model[0].bias
    layer = lora_layers(adapt(model, RANK, ALPHA, ["0"]))["0"]
    set_lora_strength(model, strength)
    expected = formula(x, weight, bias, layer, strength * ALPHA / RANK)
    merge_lora(model)
    np.testing.assert_allclose(numpy(model(x)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_both_forms_merge_to_the_same_bits(adapt, dtype):
    model = one_layer(dtype)
    weight = model[0].weight.detach().clone()
    layer = lora_layers(adapt(model, RANK, ALPHA, ["0"]))["0"]
    expected = torch.addmm(weight, layer.lora_B, layer.lora_A, alpha=layer.scaling)
    merge_lora(model)
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_merging_moves_the_outputs_by_rounding_only(adapt, dtype, tolerance):
    model, images = RichBoyNet().to(dtype), torch.randn(3, 28, 28, dtype=dtype)
    adapt(model, 2, 0.1, ["fc1", "fc2", "fc3"])
    before = model(images)
    merge_lora(model)
    torch.testing.assert_close(model(images), before, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("finish", [merge_lora, remove_lora])
def test_merge_and_remove_leave_the_plain_frozen_model(adapt, finish):
    model = RichBoyNet()
    names, types = model.state_dict().keys(), [type(module) for module in model.modules()]
    finish(adapt(model, 2, 4, ["fc1", "fc3"]))
    assert model.state_dict().keys() == names
    assert [type(module) for module in model.modules()] == types
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert lora_layers(model) == {}


def test_merge_leaves_other_weights_alone(adapt):
    model = RichBoyNet()
    before = copy.deepcopy(model.state_dict())
    merge_lora(adapt(model, 2, 4, ["fc1", "fc3"]))
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {"fc1.weight", "fc3.weight"}


@pytest.mark.parametrize("strength", [0, 1, 0.5])
def test_remove_restores_the_very_weights_bit_for_bit(adapt, strength):
    model, images = RichBoyNet(), torch.randn(8, 28, 28)
    before, logits = copy.deepcopy(model.state_dict()), model(images)
    parameters = dict(model.named_parameters())
    adapt(model, 2, 4, ["fc1", "fc3"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(images).square().mean().backward()
    optimizer.step()
    set_lora_strength(model, strength)
    remove_lora(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert torch.equal(model(images), logits)


def test_nested_layers_merge_in_place(adapt):
    model = nested()
    weight = model["blocks"][1]["fc"].weight.detach().clone()
    layer = lora_layers(adapt(model, 2, 4, ["blocks.1.fc"]))["blocks.1.fc"]
    merge_lora(model)
    merged = weight + 2 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(model["blocks"][1]["fc"].weight, merged)


def test_one_model_can_hold_both_forms():
    model, x = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, OUT)), torch.randn(4, IN)
    before = model(x)
    add_lora(model, RANK, ALPHA, ["0"])
    factors = LoRAParametrization(model[1].weight, RANK, ALPHA)
    parametrize.register_parametrization(model[1], "weight", factors)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    assert len(lora_layers(model)) == 2
    with lora_disabled(model):
        assert torch.equal(model(x), before)
    adapted = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-4)


def test_merging_switched_off_lora_is_refused(adapt, unchanged):
    model = adapt(nested(), 1, 1, ["xfc", "fcx"])
    lora_layers(model)["fcx"].strength = 0
    with unchanged(model), pytest.raises(ValueError, match="LoRA is off in fcx"):
        merge_lora(model)


def test_after_a_merge_there_is_nothing_to_merge_or_save(adapt, unchanged, tmp_path):
    model = adapt(one_layer(), RANK, ALPHA, ["0"])
    merge_lora(model)
    for call in (merge_lora, remove_lora, lora_state_dict):
        with unchanged(model), pytest.raises(ValueError, match="no LoRA layers: call add_lora"):
            call(model)
    with pytest.raises(ValueError, match="no LoRA layers"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_strength_and_disabled_need_lora():
    with pytest.raises(ValueError, match="no LoRA layers"):
        set_lora_strength(one_layer(), 1)
    with pytest.raises(ValueError, match="no LoRA layers"), lora_disabled(one_layer()):
        pass


@pytest.mark.parametrize("finish", [merge_lora, remove_lora])
def test_a_model_can_be_adapted_again(adapt, finish):
    model = adapt(one_layer(), RANK, ALPHA, ["0"])
    finish(model)
    add_lora(model, 1, 1, ["0"])
    assert lora_layers(model)["0"].rank == 1


def test_a_deep_copy_is_independent(adapt):
    model, x = adapt(one_layer(), RANK, ALPHA, ["0"]), torch.randn(4, IN).double()
    before = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), before)
    nn.init.ones_(lora_layers(twin)["0"].lora_B)
    set_lora_strength(twin, 0.5)
    if adapt.form == "branch":  # parametrize shares the generated class with the copy
        merge_lora(twin)
    assert torch.equal(model(x), before)


# --- The model is itself the layer -----------------------------------------------------


def test_a_parametrized_layer_can_be_the_whole_model():
    layer = nn.Linear(IN, OUT)
    weight = layer.weight.detach().clone()
    for finish in (remove_lora, merge_lora):
        factors = LoRAParametrization(layer.weight, RANK, ALPHA)
        nn.init.normal_(factors.lora_B)
        parametrize.register_parametrization(layer, "weight", factors)
        adapted = layer.weight.detach().clone()
        finish(layer)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, weight if finish is remove_lora else adapted)


def test_a_branch_layer_can_be_switched_off_alone():
    layer, x = nn.Linear(IN, OUT), torch.randn(4, IN)
    before = layer(x)
    adapted = LoRALinear(layer, RANK, ALPHA)
    nn.init.normal_(adapted.lora_B)
    with lora_disabled(adapted):
        assert torch.equal(adapted(x), before)
    assert not torch.equal(adapted(x), before)
    assert not layer.weight.requires_grad and not layer.bias.requires_grad


@pytest.mark.parametrize("finish", [merge_lora, remove_lora])
def test_a_branch_layer_cannot_replace_itself(unchanged, finish):
    layer = LoRALinear(nn.Linear(IN, OUT), RANK, ALPHA)
    nn.init.normal_(layer.lora_B)
    with unchanged(layer), pytest.raises(ValueError, match="model that holds it"):
        finish(layer)


@pytest.mark.parametrize("targets", [[""], ["fc"]])
def test_a_linear_layer_alone_cannot_be_a_target(unchanged, targets):
    layer = nn.Linear(IN, OUT)
    with unchanged(layer), pytest.raises(ValueError, match="no linear layer"):
        add_lora(layer, 1, 1, targets)


# --- Counting, device ------------------------------------------------------------------


def test_richboynet_with_rank_1_has_the_counts_of_the_formula(adapt):
    model = RichBoyNet()
    assert count_parameters(model) == (2_807_010, 2_807_010)
    adapt(model, 1, 1, ["fc1", "fc2", "fc3"])
    assert count_parameters(model) == (2_813_804, 6_794)
    assert count_parameters(model).total == 2_813_804
    assert count_parameters(model).trainable == 784 + 1000 + 1000 + 2000 + 2000 + 10


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert count_parameters(model) == (9, 9)


@pytest.mark.parametrize(
    ("cuda", "mps", "device"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_pick_device_takes_the_fastest(monkeypatch, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device() == torch.device(device)
