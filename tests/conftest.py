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
    """Return a function that adapts a model in one form, fills B, and returns the factors."""

    def adapt(model, rank, alpha, targets):
        if request.param == "branch":
            lora_utils.add_lora(model, rank, alpha, targets)
        else:
            for layer in map(model.requires_grad_(False).get_submodule, targets):
                factors = lora_utils.LoRAParametrization(layer, rank, alpha)
                parametrize.register_parametrization(layer, "weight", factors)
        found = [m for m in model.modules() if isinstance(m, lora_utils.LoRAFactors)]
        for factors in found:
            torch.nn.init.normal_(factors.lora_B)
        return found

    return adapt


def bits(tensor):
    """Return the bytes of a tensor, if it has any."""
    return "meta" if tensor.is_meta else tensor.clone().view(-1).view(torch.uint8).tolist()


def describe(model):
    """Return all that a failed call must not change: bits, flags, types, modes and strengths."""
    return (
        {name: (t.dtype, t.shape, bits(t)) for name, t in model.state_dict().items()},
        {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()},
        [(name, id(m), type(m), m.training) for name, m in model.named_modules()],
        [m.strength for m in model.modules() if isinstance(m, lora_utils.LoRAFactors)],
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


@pytest.fixture
def refused(unchanged):
    """Return a context manager: its block raises, names what is wrong, and changes no model."""

    @contextmanager
    def refused(model, *named, error=ValueError):
        with unchanged(model), pytest.raises(error) as caught:
            yield
        assert all(str(name) in str(caught.value) for name in named), caught.value

    return refused
