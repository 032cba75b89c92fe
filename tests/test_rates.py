"""The sweep of notebook 5: what makes its comparisons fair, and what its file must hold."""

import json

import pytest
import torch

import lora_tasks
from experiments.sweep_rates import adapt, best_rate, everything, lora, only

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


def test_every_stored_best_rate_has_a_worse_one_on_both_sides():
    stored = json.loads((lora_tasks.DATA / "rates.json").read_text(encoding="utf-8"))
    for name, errors in stored["results"]["validation"].items():
        rates = sorted(map(float, errors))
        assert rates[0] < best_rate(errors) < rates[-1], name
