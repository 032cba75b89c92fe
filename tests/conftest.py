"""What the unit tests share: both forms of LoRA, and a way to see that nothing changed."""

from contextlib import contextmanager

import matplotlib
import pytest
import torch
from torch.nn.utils import parametrize

import lora_utils

matplotlib.use("Agg")  # not by MPLBACKEND: the notebooks' kernels would inherit that


@pytest.fixture(autouse=True)
def seed():
    """Give each test the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=["branch", "parametrization"])
def adapt(request):
    """Return a function that freezes a model, adapts it in one form and fills B with noise."""

    def adapt(model, rank, alpha, targets):
        if request.param == "branch":
            lora_utils.add_lora(model, rank, alpha, targets)
        else:
            model.requires_grad_(False)
            for name in targets:
                layer = model.get_submodule(name)
                factors = lora_utils.LoRAParametrization(layer.weight, rank, alpha)
                parametrize.register_parametrization(layer, "weight", factors)
        for layer in lora_utils.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B)
        return model

    adapt.form = request.param
    return adapt


def raw(tensor):
    return tensor.dtype, tensor.shape, tensor.detach().contiguous().view(torch.uint8).tolist()


def describe(model):
    """Return all that a failed call must not change: bits, flags, types and strengths."""
    return (
        {name: raw(tensor) for name, tensor in model.state_dict().items()},
        {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()},
        [(name, id(module), type(module)) for name, module in model.named_modules()],
        [layer.strength for layer in lora_utils.lora_layers(model).values()],
    )


@pytest.fixture
def unchanged():
    """Return a context manager that asserts that its block leaves a model as it was."""

    @contextmanager
    def unchanged(model):
        before = describe(model)
        yield
        assert describe(model) == before

    return unchanged
