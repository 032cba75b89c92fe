"""Adapter files: what they hold, PEFT reads and writes the same, and no fault loads silently."""

import copy
import json
import os
import random
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn as nn
from torch.nn.utils import parametrize

import lora_utils
from lora_utils import (
    LoRALinear,
    LoRAParametrization,
    RichBoyNet,
    add_lora,
    count_parameters,
    load_adapter,
    load_lora_state_dict,
    lora_disabled,
    lora_layers,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    set_lora_strength,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = Path(lora_utils.__file__).parent


def small_net(dtype=torch.float32):
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(6, 8, dtype=dtype), relu=nn.ReLU(), fc2=nn.Linear(8, 4, dtype=dtype)
        )
    )


def small_adapted(rank=2, alpha=3, targets=("fc1", "fc2")):
    """A small model with LoRA, as if it were trained."""
    model = small_net()
    add_lora(model, rank, alpha, list(targets))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    return model


@pytest.fixture(params=["plain", "adapted"])
def model(request):
    """A model that a failed load must leave alone."""
    return small_net() if request.param == "plain" else small_adapted(1, 1, ["fc2"])


@pytest.fixture
def folder(tmp_path):
    """A folder with a good adapter of rank 2 and alpha 3."""
    save_adapter(small_adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def read_tensors(folder):
    return safetensors.torch.load_file(folder / WEIGHTS)


def meaning(folder):
    """All that the files say; safetensors writes its metadata in an order of chance."""
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    tensors = {name: (t.dtype, t.tolist()) for name, t in read_tensors(folder).items()}
    return sorted(contents(folder)), (folder / CONFIG).read_text(), metadata, tensors


def same_tensors(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def edit_config(folder, edit):
    config = json.loads((folder / CONFIG).read_text())
    edit(config)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(folder, edit, keep_copy=True):
    """Change the tensors; keep_copy=False drops what only our files hold, as PEFT's do."""
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata() if keep_copy else {"format": "pt"}
    tensors = read_tensors(folder)
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata=metadata)


# --- Factors as a dictionary -----------------------------------------------------------


def test_state_dict_holds_copies_of_the_factors(adapt):
    model = adapt(small_net(), 2, 3, ["fc1", "fc2"])
    state = lora_state_dict(model)
    assert list(state) == ["fc1.lora_A", "fc1.lora_B", "fc2.lora_A", "fc2.lora_B"]
    assert [tuple(t.shape) for t in state.values()] == [(2, 6), (8, 2), (2, 8), (4, 2)]
    assert torch.equal(state["fc2.lora_B"], lora_layers(model)["fc2"].lora_B)
    assert not any(tensor.requires_grad for tensor in state.values())
    state["fc1.lora_A"].zero_()
    assert lora_layers(model)["fc1"].lora_A.count_nonzero() > 0


def test_state_dict_loads_into_the_same_parameters(adapt):
    state = lora_state_dict(small_adapted())
    model = adapt(small_net(), 2, 3, ["fc1", "fc2"])
    parameters = dict(model.named_parameters())
    load_lora_state_dict(model, state)
    assert same_tensors(lora_state_dict(model), state)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert count_parameters(model).trainable == sum(t.numel() for t in state.values())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("fc2.lora_B"), "lacks fc2.lora_B"),
        (lambda s: s.update(new=torch.ones(1)), "has new, which"),
        (lambda s: s.update({"fc2.lora_B": torch.ones(2, 4)}), r"\(2, 4\) .* ask for \(4, 2\)"),
        (lambda s: s.update({"fc2.lora_B": torch.ones(1)}), r"\(1,\) .* ask for \(4, 2\)"),
        (lambda s: s.clear(), "lacks fc1.lora_A, fc1.lora_B, fc2.lora_A, fc2.lora_B"),
    ],
)
def test_state_dict_that_does_not_fit_is_refused(adapt, unchanged, edit, message):
    model = adapt(small_net(), 2, 3, ["fc1", "fc2"])
    state = {name: torch.ones_like(tensor) for name, tensor in lora_state_dict(model).items()}
    edit(state)
    with unchanged(model), pytest.raises(ValueError, match=message):
        load_lora_state_dict(model, state)


def test_state_dict_needs_lora(unchanged):
    model = small_net()
    for call in (lora_state_dict, lambda model: load_lora_state_dict(model, {})):
        with unchanged(model), pytest.raises(ValueError, match="no LoRA layers"):
            call(model)


# --- What the files hold ---------------------------------------------------------------


def test_files_are_in_the_format_of_peft(adapt, tmp_path):
    model = adapt(small_net(), 2, 3, ["fc2"])
    save_adapter(model, str(tmp_path / "new" / "folder"))
    folder = tmp_path / "new" / "folder"
    assert sorted(contents(folder)) == [CONFIG, WEIGHTS]
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 3)
    assert (config["target_modules"], config["bias"]) == (["fc2"], "none")
    tensors = read_tensors(folder)
    assert tensors.keys() == {f"base_model.model.fc2.lora_{ab}.weight" for ab in "AB"}
    layer = lora_layers(model)["fc2"]
    assert torch.equal(tensors["base_model.model.fc2.lora_A.weight"], layer.lora_A)
    assert torch.equal(tensors["base_model.model.fc2.lora_B.weight"], layer.lora_B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path, dtype):
    model, x = small_net(dtype), torch.randn(5, 6, dtype=dtype)
    base = copy.deepcopy(model)
    add_lora(model, 2, 3.5, ["fc1", "fc2"])
    nn.init.normal_(model.fc1.lora_B)
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    assert same_tensors(lora_state_dict(base), lora_state_dict(model))
    assert torch.equal(base(x), model(x))
    assert {type(layer) for layer in lora_layers(base).values()} == {LoRALinear}
    assert [(layer.rank, layer.alpha) for layer in lora_layers(base).values()] == [(2, 3.5)] * 2
    assert count_parameters(base) == count_parameters(model)


def test_the_strength_is_not_saved(tmp_path):
    model, base = small_adapted(), small_net()
    save_adapter(model, tmp_path / "full")
    set_lora_strength(model, 0.5)
    save_adapter(model, tmp_path / "half")
    assert meaning(tmp_path / "full") == meaning(tmp_path / "half")
    with lora_disabled(model):
        save_adapter(model, tmp_path / "off")
    load_adapter(base, tmp_path / "off")
    assert [layer.strength for layer in lora_layers(base).values()] == [1, 1]
    assert same_tensors(lora_state_dict(base), lora_state_dict(model))


def test_a_new_adapter_replaces_the_old_files(folder):
    save_adapter(new := small_adapted(1, 7, ["fc1"]), folder)
    load_adapter(model := small_net(), folder)
    assert same_tensors(lora_state_dict(model), lora_state_dict(new))
    assert lora_layers(model)["fc1"].alpha == 7
    assert sorted(contents(folder)) == [CONFIG, WEIGHTS]


def test_load_replaces_the_lora_that_is_there(adapt, folder):
    model = small_net()
    weight = model.fc1.weight.detach().clone()
    adapt(model, 4, 9, ["fc1"])
    set_lora_strength(model, 0.5)
    load_adapter(model, folder)
    assert list(lora_layers(model)) == ["fc1", "fc2"]
    assert isinstance(model.fc1, LoRALinear) and type(model.fc1.base) is nn.Linear
    assert (model.fc1.rank, model.fc1.alpha, model.fc1.strength) == (2, 3, 1)
    assert torch.equal(model.fc1.base.weight, weight)


def test_load_keeps_the_dtype_of_the_model(folder):
    load_adapter(model := small_net(torch.bfloat16), folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    saved = read_tensors(folder)["base_model.model.fc1.lora_B.weight"]
    assert torch.equal(model.fc1.lora_B, saved.bfloat16())


def test_saving_layers_of_different_settings_is_refused(tmp_path):
    for rank, alpha in [(1, 3), (2, 4)]:
        model = small_adapted(2, 3, ["fc1"])
        add_lora(model, rank, alpha, ["fc2"])
        with pytest.raises(ValueError, match=rf"one rank and one alpha, not .*\({rank}, {alpha}\)"):
            save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_without_lora_is_refused(folder):
    before = contents(folder)
    with pytest.raises(ValueError, match="no LoRA layers"):
        save_adapter(small_net(), folder)
    assert contents(folder) == before


def test_an_adapter_whose_names_mean_other_layers_too_is_not_saved(tmp_path):
    model = nn.ModuleDict({"fc": nn.Linear(3, 3), "block": nn.ModuleDict({"fc": nn.Linear(3, 3)})})
    factors = LoRAParametrization(model["fc"].weight, 1, 1)
    parametrize.register_parametrization(model["fc"], "weight", factors)
    with pytest.raises(ValueError, match="block.fc"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- Parity with PEFT ------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft():
    import peft  # imports transformers: several seconds

    return peft


SETTINGS = [
    (1, 2, ["fc1", "fc2", "fc3"]),
    (4, 16, ["fc1", "fc3"]),
    (8, 4, ["fc2"]),
]


@pytest.mark.parametrize(("rank", "alpha", "targets"), SETTINGS)
def test_peft_loads_what_we_save(peft, adapt, tmp_path, rank, alpha, targets):
    model, images = RichBoyNet(), torch.randn(5, 28, 28)
    plain = copy.deepcopy(model)
    save_adapter(adapt(model, rank, alpha, targets), tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path), is_trainable=True)
    torch.testing.assert_close(theirs(images), model(images), rtol=1e-4, atol=1e-4)
    assert count_parameters(theirs) == count_parameters(model)
    with lora_disabled(model), theirs.disable_adapter():
        assert torch.equal(theirs(images), model(images))


@pytest.mark.parametrize(("rank", "alpha", "targets"), SETTINGS)
def test_we_load_what_peft_saves(peft, tmp_path, rank, alpha, targets):
    model, images = RichBoyNet(), torch.randn(5, 28, 28)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-4)
    assert count_parameters(model) == count_parameters(theirs)
    assert list(lora_layers(model)) == targets


def test_merged_weights_equal_those_of_peft(peft, tmp_path):
    model = RichBoyNet()
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["fc1"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    merge_lora(model)
    torch.testing.assert_close(model.fc1.weight, theirs.merge_and_unload().fc1.weight)


@pytest.mark.parametrize("targets", [["fc"], ["b.fc"], ["xfc", "fc"]])
def test_targets_mean_the_layers_that_peft_means(peft, targets):
    def model():
        names = {"fc": nn.Linear(3, 3), "xfc": nn.Linear(3, 3), "fcx": nn.Linear(3, 3)}
        return nn.ModuleDict({**names, "b": nn.ModuleDict({"fc": nn.Linear(3, 3)})})

    ours, config = model(), peft.LoraConfig(r=1, target_modules=targets)
    theirs = peft.get_peft_model(model(), config)
    add_lora(ours, 1, 1, targets)
    named = [name for name, _ in theirs.base_model.model.named_modules() if name.endswith("lora_A")]
    assert [f"{name}.lora_A" for name in lora_layers(ours)] == named


def test_our_config_holds_only_settings_that_peft_knows(peft, folder):
    assert json.loads((folder / CONFIG).read_text()).keys() <= peft.LoraConfig().to_dict().keys()


@pytest.mark.filterwarnings("ignore")  # PEFT warns of some of its own variants
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"fc1": 1}}, "rank_pattern"),
        ({"alpha_pattern": {"fc1": 1}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "bias"),
        ({"target_modules": ["fc1"], "modules_to_save": ["fc2"]}, "fc2"),
    ],
)
def test_what_peft_computes_in_another_way_is_refused(
    peft, model, unchanged, tmp_path, settings, named
):
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["fc1", "fc2"], **settings})
    peft.get_peft_model(small_net(), config).save_pretrained(tmp_path)
    with unchanged(model), pytest.raises(ValueError, match=named):
        load_adapter(model, tmp_path)


# --- Faulty files ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_cut_anywhere_is_refused(model, unchanged, folder, name):
    content = (folder / name).read_bytes()
    with unchanged(model):
        for length in {*range(0, len(content), 9), len(content) - 1}:
            (folder / name).write_bytes(content[:length])
            with pytest.raises(ValueError, match="is damaged"):
                load_adapter(model, folder)


def test_a_flipped_bit_before_the_numbers_never_gives_a_wrong_adapter(folder):
    content = (folder / WEIGHTS).read_bytes()
    load_adapter(model := small_net(), folder)
    good, refused = lora_state_dict(model), 0
    end_of_header = 8 + int.from_bytes(content[:8], "little")
    for position in range(end_of_header):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (folder / WEIGHTS).write_bytes(flipped)
        try:
            load_adapter(model := small_net(), folder)
        except ValueError:
            refused += 1
        else:
            assert same_tensors(lora_state_dict(model), good), position
    assert refused > end_of_header / 2


def test_bytes_after_the_end_are_refused(model, unchanged, folder):
    for name in (CONFIG, WEIGHTS):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b"{}")
        with unchanged(model), pytest.raises(ValueError, match="is damaged"):
            load_adapter(model, folder)
        (folder / name).write_bytes(content)
    load_adapter(model, folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_folder_that_lacks_a_file_is_refused(model, unchanged, folder, name):
    (folder / name).unlink()
    with unchanged(model), pytest.raises(FileNotFoundError, match=f"it has no file {name}"):
        load_adapter(model, folder)


def test_what_is_no_folder_is_refused(model, unchanged, folder):
    for path in (folder / "none", folder / CONFIG, str(folder / WEIGHTS)):
        with unchanged(model), pytest.raises(FileNotFoundError, match="no adapter in"):
            load_adapter(model, path)


def test_files_of_two_adapters_do_not_mix(model, unchanged, folder, tmp_path):
    for rank, alpha, targets in [(1, 3, ["fc1", "fc2"]), (2, 4, ["fc1", "fc2"]), (2, 3, ["fc1"])]:
        save_adapter(small_adapted(rank, alpha, targets), tmp_path / "other")
        (folder / CONFIG).write_bytes((tmp_path / "other" / CONFIG).read_bytes())
        with unchanged(model), pytest.raises(ValueError, match="not the one saved with"):
            load_adapter(model, folder)


def test_a_wrong_alpha_is_noticed(model, unchanged, folder):
    edit_config(folder, lambda config: config.update(lora_alpha=6))
    with unchanged(model), pytest.raises(ValueError, match="not the one saved with"):
        load_adapter(model, folder)


CONFIG_FAULTS = [
    ({"r": 1}, r"lora_A.weight has shape \(2, 6\) .* ask for \(1, 6\)"),
    ({"r": 9}, "rank must be a whole number from 1 to 6"),
    ({"r": 0}, "rank"),
    ({"r": 2.0}, "rank"),
    ({"r": "2"}, "rank"),
    ({"r": None}, "rank"),
    ({"lora_alpha": 0}, "alpha"),
    ({"lora_alpha": "3"}, "alpha"),
    ({"lora_alpha": None}, "alpha"),
    (
        {"target_modules": ["fc1"]},
        r"has .*fc2.lora_A.weight, .*fc2.lora_B.weight, which the model has no place",
    ),
    ({"target_modules": ["fc1", "nope"]}, "'nope'; there are fc1, fc2"),
    ({"target_modules": []}, "list of layer names"),
    ({"target_modules": "fc1"}, "list of layer names, not 'fc1'"),
    ({"target_modules": None}, "list of layer names"),
    ({"peft_type": "LOHA"}, "does not describe a LoRA adapter"),
    ({"peft_type": None}, "does not describe a LoRA adapter"),
    ({"use_rslora": True}, "use_rslora"),
    ({"use_dora": True}, "use_dora"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"rank_pattern": {"fc1": 2}}, "rank_pattern"),
    ({"alpha_pattern": {"fc1": 2}}, "alpha_pattern"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
]


@pytest.mark.parametrize(("fault", "message"), CONFIG_FAULTS)
def test_a_wrong_setting_is_refused_with_and_without_our_copy(
    model, unchanged, folder, fault, message
):
    edit_config(folder, lambda config: config.update(fault))
    with unchanged(model), pytest.raises(ValueError, match=f"not the one saved with|{message}"):
        load_adapter(model, folder)
    edit_tensors(folder, lambda tensors: None, keep_copy=False)
    with unchanged(model), pytest.raises(ValueError, match=message):
        load_adapter(model, folder)


@pytest.mark.parametrize("setting", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_missing_setting_is_refused(model, unchanged, folder, setting):
    edit_tensors(folder, lambda tensors: None, keep_copy=False)
    edit_config(folder, lambda config: config.pop(setting))
    with unchanged(model), pytest.raises(ValueError, match="does not describe a LoRA adapter"):
        load_adapter(model, folder)


@pytest.mark.parametrize("text", ["[]", "[1, 2]", '"LORA"', "7", "null", "true"])
@pytest.mark.parametrize("keep_copy", [True, False])
def test_json_that_is_no_object_is_refused(model, unchanged, folder, text, keep_copy):
    edit_tensors(folder, lambda tensors: None, keep_copy)
    (folder / CONFIG).write_text(text)
    with unchanged(model), pytest.raises(ValueError, match=CONFIG):
        load_adapter(model, folder)


def test_settings_without_effect_are_ignored(folder):
    edit_tensors(folder, lambda tensors: None, keep_copy=False)
    harmless = {"use_dora": False, "rank_pattern": {}, "init_lora_weights": "gaussian", "new": 1}
    edit_config(folder, lambda config: config.update(harmless))
    load_adapter(model := small_net(), folder)
    assert list(lora_layers(model)) == ["fc1", "fc2"]


A1, B1 = (f"base_model.model.fc1.lora_{factor}.weight" for factor in "AB")


@pytest.mark.parametrize("keep_copy", [True, False])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(A1), f"lacks {A1}$"),
        (
            lambda t: t.update({A1.replace("fc1", "fc3"): torch.ones(2, 6)}),
            "has .*fc3.lora_A.weight, w",
        ),
        (lambda t: t.update({"fc1.lora_A": torch.ones(2, 6)}), "has fc1.lora_A, which"),
        (lambda t: t.update({A1.replace("fc1", "fc3"): t.pop(A1)}), f"lacks {A1}$"),
        (lambda t: t.update({"x." + A1: t.pop(A1)}), f"lacks {A1}$"),
        (lambda t: t.update({A1: t[A1].T.contiguous()}), r"fc1.lora_A.weight has shape \(6, 2\)"),
        (
            lambda t: t.update({A1: t[B1].clone(), B1: t[A1].clone()}),
            r"fc1.lora_A.weight .* \(8, 2\)",
        ),
        (lambda t: t.update({A1: torch.ones(1, 6)}), r"\(1, 6\) .* ask for \(2, 6\)"),
        (lambda t: t.update({A1: torch.tensor(1.0)}), r"\(\) .* ask for \(2, 6\)"),
        (lambda t: t.clear(), f"lacks {A1}, {B1}, .*fc2.lora_A.weight, .*fc2.lora_B.weight$"),
    ],
)
def test_a_wrong_tensor_is_refused(model, unchanged, folder, edit, message, keep_copy):
    edit_tensors(folder, edit, keep_copy)
    with unchanged(model), pytest.raises(ValueError, match=message):
        load_adapter(model, folder)


def test_an_adapter_for_another_model_is_refused(unchanged, folder):
    wider = nn.Sequential(OrderedDict(fc1=nn.Linear(7, 8), fc2=nn.Linear(8, 4)))
    with unchanged(wider), pytest.raises(ValueError, match=r"\(2, 6\) .* ask for \(2, 7\)"):
        load_adapter(wider, folder)
    deeper = nn.Sequential(OrderedDict(net=small_net(), fc1=nn.Linear(6, 8), fc2=nn.Linear(8, 4)))
    with unchanged(deeper), pytest.raises(ValueError, match="lacks .*net.fc1.lora_A"):
        load_adapter(deeper, folder)
    foreign = nn.Sequential(nn.Linear(6, 8))
    with unchanged(foreign), pytest.raises(ValueError, match="'fc1'; there are 0"):
        load_adapter(foreign, folder)


def test_a_layer_alone_cannot_take_an_adapter(unchanged, tmp_path):
    layer = nn.Linear(6, 8)
    factors = LoRAParametrization(layer.weight, 1, 1)
    parametrize.register_parametrization(layer, "weight", factors)
    with pytest.raises(ValueError, match="no linear layer"):
        save_adapter(layer, tmp_path)
    remove_lora(layer)
    save_adapter(small_adapted(), tmp_path)
    with unchanged(layer), pytest.raises(ValueError, match="no linear layer"):
        load_adapter(layer, tmp_path)


# --- Faults while saving ---------------------------------------------------------------


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_failed_save_leaves_the_old_files(monkeypatch, folder, where, call):
    before, calls = contents(folder), []
    write, rename = Path.write_bytes, os.replace

    def failing_write(path, content):
        calls.append(path)
        if where == "write" and len(calls) == call + 1:
            write(path, content[: len(content) // 2])
            raise OSError("no space left on device")
        return write(path, content)

    def failing_rename(source, target):
        calls.append(target)
        if len(calls) == call + 3:
            raise PermissionError("in use")
        return rename(source, target)

    monkeypatch.setattr(Path, "write_bytes", failing_write)
    monkeypatch.setattr(os, "replace", failing_rename)
    with pytest.raises(OSError, match="no space|in use"):
        save_adapter(small_adapted(1, 5), folder)
    monkeypatch.undo()
    assert contents(folder) == before


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_failed_first_save_leaves_no_files(monkeypatch, tmp_path, name):
    rename = os.replace

    def failing_rename(source, target):
        if target.name == name:
            raise OSError("no rename")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing_rename)
    with pytest.raises(OSError, match="no rename"):
        save_adapter(small_adapted(), tmp_path)
    assert contents(tmp_path) == {}


def test_a_path_that_is_a_file_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "adapter"):
        with pytest.raises(OSError):
            save_adapter(small_adapted(), path)
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("blocked", [CONFIG, WEIGHTS])
def test_a_file_name_that_is_taken_by_a_folder_is_left_alone(folder, blocked):
    (folder / blocked).unlink()
    (folder / blocked).mkdir()
    [other] = {CONFIG, WEIGHTS} - {blocked}
    before = (folder / other).read_bytes()
    with pytest.raises(OSError):
        save_adapter(small_adapted(1, 5), folder)
    assert (folder / other).read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}


def test_a_read_only_folder_is_left_alone(folder, monkeypatch):
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):  # root may write everywhere: refuse in the system's place
        refusal = PermissionError("this folder is read-only")
        monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=refusal))
    before = contents(folder)
    try:
        with pytest.raises(PermissionError):
            save_adapter(small_adapted(1, 5), folder)
        assert contents(folder) == before
        load_adapter(small_net(), folder)
    finally:
        folder.chmod(0o755)


KILLED_SAVES = """
import os, signal, sys
from lora_utils import add_lora, save_adapter
from torch import nn

rename = os.replace
for folder, rank, renames in [("first", 1, 0), ("second", 1, 1), ("same", 2, 1)]:
    def kill(source, target):
        global renames
        if renames == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        renames -= 1
        rename(source, target)

    if (pid := os.fork()) == 0:
        os.replace = kill
        model = nn.Sequential()
        model.fc1, model.fc2 = nn.Linear(6, 8), nn.Linear(8, 4)
        add_lora(model, rank, 3, ["fc1", "fc2"])
        save_adapter(model, sys.argv[1] + "/" + folder)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_save_never_leads_to_a_wrong_adapter(unchanged, tmp_path):
    old = small_adapted()
    for name in ("first", "second", "same"):
        save_adapter(old, tmp_path / name)
    before = {name: contents(tmp_path / name) for name in ("first", "second", "same")}
    command = [sys.executable, "-c", KILLED_SAVES, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)

    for name in ("first", "same"):  # killed before any rename; or between, with equal settings
        assert contents(tmp_path / name).items() >= before[name].items()
        load_adapter(model := small_net(), tmp_path / name)
        assert same_tensors(lora_state_dict(model), lora_state_dict(old))

    folder = tmp_path / "second"  # killed between the renames, with another rank
    assert contents(folder)[WEIGHTS] == before["second"][WEIGHTS]
    assert contents(folder)[CONFIG] != before["second"][CONFIG]
    model = small_net()
    with unchanged(model), pytest.raises(ValueError, match="not the one saved with"):
        load_adapter(model, folder)

    save_adapter(old, folder)  # the next save repairs the folder and takes the leftovers away
    load_adapter(model, folder)
    assert same_tensors(lora_state_dict(model), lora_state_dict(old))
    assert sorted(contents(folder)) == [CONFIG, WEIGHTS]


# --- All promises, on random models ----------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_promises_hold_for_random_models(adapt, tmp_path, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype, tolerance = rng.choice(
        [(torch.float32, 1e-4), (torch.bfloat16, 0.15), (torch.float64, 1e-11)]
    )
    sizes = [rng.randint(1, 12) for _ in range(rng.randint(2, 5))]
    layers = [nn.Linear(i, o, dtype=dtype) for i, o in zip(sizes, sizes[1:], strict=False)]
    model = nn.Sequential(OrderedDict((f"fc{i}", layer) for i, layer in enumerate(layers)))
    names = sorted(rng.sample(list(dict(model.named_children())), rng.randint(1, len(layers))))
    rank = rng.randint(1, min(min(model.get_submodule(n).weight.shape) for n in names))
    alpha, strength = rng.choice([1, 2 * rank, 0.5]), rng.uniform(-1.5, 1.5)
    x = torch.randn(rng.randint(1, 5), sizes[0], dtype=dtype)
    plain = copy.deepcopy(model)
    weights, base = copy.deepcopy(plain.state_dict()), plain(x)
    adapt(model, rank, alpha, names)
    for layer in lora_layers(model).values():
        layer.lora_B.data /= 4

    adapted = model(x)
    with lora_disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), adapted)

    save_adapter(model, tmp_path)
    load_adapter(plain, tmp_path)
    assert list(lora_layers(plain)) == names
    assert same_tensors(lora_state_dict(plain), lora_state_dict(model))
    torch.testing.assert_close(plain(x), adapted, rtol=tolerance, atol=tolerance)
    files = meaning(tmp_path)
    save_adapter(plain, tmp_path)
    assert meaning(tmp_path) == files
    remove_lora(plain)
    assert same_tensors(plain.state_dict(), weights)
    assert torch.equal(plain(x), base)

    hidden = x.double().numpy()
    for name in model._modules:
        weight = weights[f"{name}.weight"].double().numpy()
        if name in names:
            factors = [f.double().numpy() for f in lora_state_dict(model).values()]
            A, B = factors[2 * names.index(name) : 2 * names.index(name) + 2]
            weight = weight + strength * alpha / rank * B @ A
        hidden = hidden @ weight.T + weights[f"{name}.bias"].double().numpy()
    set_lora_strength(model, strength)
    scaled = model(x).detach().double().numpy()
    np.testing.assert_allclose(scaled, hidden, rtol=tolerance, atol=tolerance)
    merge_lora(model)
    merged = model(x).detach().double().numpy()
    np.testing.assert_allclose(merged, hidden, rtol=tolerance, atol=tolerance)
    assert model.state_dict().keys() == weights.keys()
    unadapted = weights.keys() - {f"{name}.weight" for name in names}
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in unadapted)
