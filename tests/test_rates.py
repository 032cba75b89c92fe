"""The sweep of notebook 5: what makes its comparisons fair, and what its file must hold."""

import copy
import json
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

import lora_tasks
from experiments.sweep_rates import (
    ALPHAS,
    FC1,
    TWO_WEIGHTS,
    adapt,
    best_rate,
    everything,
    least_errors,
    lora,
    lora_name,
    only,
    own_rate,
    own_rate_name,
)

CHANGES = {"full": everything, "biases": only("bias"), "r = 1": lora(1, 16), "r = 8": lora(8, 64)}


@pytest.fixture
def digits():
    images = torch.randn(300, 28, 28, generator=torch.Generator().manual_seed(0))
    return lora_tasks.Digits(images, torch.arange(300) % 10)


def test_all_methods_under_one_seed_see_the_same_batches(digits):
    seen = {}
    for name, change in CHANGES.items():
        base = lora_tasks.RichBoyNet()
        batches = seen.setdefault(name, [])
        # The hook travels into the copy that is trained.
        base.register_forward_pre_hook(lambda _, inputs, into=batches: into.append(inputs[0]))
        adapt(base, digits, change, rate=1e-3, seed=5, batches=3)
    for name, batches in seen.items():
        assert len(batches) == 3
        assert all(torch.equal(*pair) for pair in zip(batches, seen["full"], strict=True)), name


def test_another_seed_means_other_batches_and_another_A(digits):
    base = lora_tasks.RichBoyNet()
    starts = []
    for seed in (5, 6):
        model, _ = adapt(base, digits, lora(2, 16), rate=1e-30, seed=seed, batches=1)
        starts.append(model.fc1.lora_A)
    assert not torch.allclose(*starts)


def test_adapt_leaves_the_base_alone(digits):
    base = lora_tasks.RichBoyNet()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapt(base, digits, everything, rate=1e-2, seed=0, batches=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def stored_results():
    path = lora_tasks.DATA / "rates.json"
    return json.loads(path.read_text(encoding="utf-8"))["results"]


def test_every_stored_best_rate_has_a_worse_one_on_both_sides():
    for name, errors in stored_results()["validation"].items():
        rates = sorted(map(float, errors))
        assert rates[0] < best_rate(errors) < rates[-1], name


def test_the_best_alpha_of_every_rank_lies_inside_its_grid():
    validation = stored_results()["validation"]
    for rank, alphas in ALPHAS.items():
        errors = [least_errors(validation[lora_name(rank, alpha)]) for alpha in alphas]
        assert alphas == tuple(sorted(alphas))
        assert 0 < errors.index(min(errors)) < len(alphas) - 1, f"rank {rank}"


def test_the_best_rate_of_fc1_lies_inside_its_grid():
    validation = stored_results()["validation"]
    times = sorted([1, *map(Fraction, FC1)])
    for name in ("full", TWO_WEIGHTS):
        names = {Fraction(t): own_rate_name(name, t) for t in FC1} | {1: name}
        errors = [least_errors(validation[names[t]]) for t in times]
        assert 0 < errors.index(min(errors)) < len(times) - 1, name


@pytest.mark.parametrize("change", [everything, lora(2, 16)])
def test_own_rate_is_a_parameter_group_of_its_own(digits, change):
    torch.manual_seed(0)
    base = lora_tasks.RichBoyNet()
    ours, _ = adapt(base, digits, own_rate(change, 1 / 4), rate=1e-3, seed=5, batches=4)

    theirs = copy.deepcopy(base)
    torch.manual_seed(5)
    change(theirs)
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    first = [parameter for name, parameter in trained.items() if name.startswith("fc1")]
    rest = [parameter for name, parameter in trained.items() if not name.startswith("fc1")]
    groups = [{"params": first, "lr": 1e-3 / 4, "eps": 4e-8}, {"params": rest, "lr": 1e-3}]
    optimizer = torch.optim.Adam(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    torch.manual_seed(5)
    for batch in torch.randperm(300)[:256].view(4, 64):
        optimizer.zero_grad()
        F.cross_entropy(theirs(digits.images[batch]), digits.labels[batch]).backward()
        optimizer.step()
        scheduler.step()
    for name in ("fc1", "fc2"):
        weights = [m.get_submodule(name) for m in (ours, theirs, base)]
        if change is not everything:
            weights = [*(layer.delta_W() for layer in weights[:2]), torch.zeros(())]
        else:
            weights = [layer.weight for layer in weights]
        moved = [weight - weights[2] for weight in weights[:2]]
        assert (moved[0] - moved[1]).norm() < 1e-3 * moved[1].norm(), name
