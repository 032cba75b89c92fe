"""Adapter files: PEFT reads and writes the same, and no fault loads silently."""

import copy
import json
import os
import random
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn as nn

import lora_show
import lora_utils as lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = Path(lora.__file__).parent


def small_net(dtype=torch.float32):
    layers = {"fc1": nn.Linear(6, 8), "relu": nn.ReLU(), "fc2": nn.Linear(8, 4)}
    return nn.Sequential(OrderedDict(layers)).to(dtype)


def trained(rank=2, alpha=3, targets=("fc1", "fc2"), model=None):
    """A model with LoRA, as if it were trained."""
    model = model or small_net()
    lora.add_lora(model, rank, alpha, list(targets))
    for layer in lora.lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    return model


@pytest.fixture(params=["plain", "adapted"])
def model(request):
    """A model that a failed load must leave alone."""
    return small_net() if request.param == "plain" else trained(1, 1, ["fc2"])


@pytest.fixture
def folder(tmp_path):
    """A folder with a good adapter of rank 2 and alpha 3."""
    lora.save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def factors_in(folder):
    """The factors and settings that a plain model has once it has loaded the folder."""
    lora.load_adapter(model := small_net(), folder)
    settings = {name: (layer.rank, layer.alpha) for name, layer in lora.lora_layers(model).items()}
    return settings, {name: tensor.tolist() for name, tensor in lora.lora_state_dict(model).items()}


def edit(folder, settings=lambda config: None, factors=lambda tensors: None, keep_copy=True):
    """Change an adapter's files; keep_copy=False drops what only ours hold, as PEFT's do."""
    config = json.loads((folder / CONFIG).read_text())
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata() if keep_copy else {"format": "pt"}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    settings(config)
    factors(tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata=metadata)


# --- What is saved ---------------------------------------------------------------------


def test_the_state_dict_is_a_copy_that_loads_into_the_same_parameters():
    state, model = lora.lora_state_dict(source := trained()), trained()
    names = ["fc1.lora_A", "fc1.lora_B", "fc2.lora_A", "fc2.lora_B"]
    assert list(state) == names
    assert all(torch.equal(state[name], source.get_parameter(name)) for name in names)
    before = dict(model.named_parameters())
    lora.load_lora_state_dict(model, state)
    assert lora_show.same_tensors(lora.lora_state_dict(model), state)
    for name, parameter in model.named_parameters():
        assert parameter is before[name] and parameter.requires_grad == (name in names)
    state["fc1.lora_A"].zero_()
    assert source.fc1.lora_A.count_nonzero() == model.fc1.lora_A.count_nonzero() == 12


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (lambda s: s.pop("fc2.lora_B"), ["fc2.lora_B"]),
        (lambda s: s.update(new=torch.ones(1)), ["new"]),
        (lambda s: s.update({"fc2.lora_B": torch.ones(2, 4)}), ["fc2.lora_B", (2, 4), (4, 2)]),
        (lambda s: s.update({"fc2.lora_B": torch.ones(1)}), ["fc2.lora_B", (1,), (4, 2)]),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(refused, fault, named):
    state = lora.lora_state_dict(trained())
    fault(state)
    with refused(model := trained(), *named):
        lora.load_lora_state_dict(model, state)


def test_load_replaces_the_lora_that_is_there_and_keeps_the_dtype(folder):
    model = trained(4, 9, ["fc1"], small_net(torch.bfloat16))
    weight = model.fc1.base.weight
    lora.set_lora_strength(model, 0.5)
    lora.load_adapter(model, folder)
    assert model.fc1.base.weight is weight and list(lora.lora_layers(model)) == ["fc1", "fc2"]
    assert (model.fc1.rank, model.fc1.alpha, model.fc1.strength) == (2, 3, 1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    lora.save_adapter(trained(targets=["fc2"]), folder)
    lora.load_adapter(model, folder)
    assert type(model.fc1) is nn.Linear and list(lora.lora_layers(model)) == ["fc2"]


def test_a_loaded_adapter_no_longer_hangs_on_its_file(folder):
    lora.load_adapter(model := small_net(), folder)
    before, size = lora.lora_state_dict(model), (folder / WEIGHTS).stat().st_size
    with (folder / WEIGHTS).open("r+b") as file:  # in place
        file.write(b"\xff" * size)
    assert lora_show.same_tensors(lora.lora_state_dict(model), before)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 3), (2, 4)])
def test_layers_of_different_settings_cannot_be_saved_together(refused, tmp_path, rank, alpha):
    model = trained(rank, alpha, ["fc2"], trained(2, 3, ["fc1"]))
    with refused(model, (rank, alpha), (2, 3)):
        lora.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- Parity with PEFT ------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft():
    import peft  # imports transformers: several seconds

    return peft


def save_with_peft(peft, folder, model=None, **settings):
    settings = {"r": 2, "target_modules": ["fc1", "fc2"], "init_lora_weights": False, **settings}
    theirs = peft.get_peft_model(model or small_net(), peft.LoraConfig(**settings))
    theirs.save_pretrained(folder)
    return theirs


SETTINGS = [(1, 2, ["fc1", "fc2"]), (4, 16, ["fc2"]), (3, 1, ["fc1"])]


@pytest.mark.parametrize(("rank", "alpha", "targets"), SETTINGS)
def test_peft_loads_what_we_save(peft, tmp_path, rank, alpha, targets):
    plain, x = small_net(), torch.randn(5, 6)
    model = trained(rank, alpha, targets, copy.deepcopy(plain))
    lora.save_adapter(model, str(folder := tmp_path / "new" / "folder"))
    assert json.loads((folder / CONFIG).read_text()).keys() <= peft.LoraConfig().to_dict().keys()
    theirs = peft.PeftModel.from_pretrained(plain, str(folder), is_trainable=True)
    torch.testing.assert_close(theirs(x), model(x))
    assert lora.count_parameters(theirs) == lora.count_parameters(model)
    with lora.lora_disabled(model), theirs.disable_adapter():
        assert torch.equal(theirs(x), model(x))


@pytest.mark.parametrize(("rank", "alpha", "targets"), SETTINGS)
def test_we_load_what_peft_saves_and_merge_to_the_same(peft, tmp_path, rank, alpha, targets):
    model, x = small_net(), torch.randn(5, 6)
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
    theirs = save_with_peft(peft, tmp_path, copy.deepcopy(model), **settings)
    lora.load_adapter(model, tmp_path)
    assert list(lora.lora_layers(model)) == targets
    torch.testing.assert_close(model(x), theirs(x))
    assert lora.count_parameters(model) == lora.count_parameters(theirs)
    lora.merge_lora(model)
    torch.testing.assert_close(model.state_dict(), theirs.merge_and_unload().state_dict())


def nested():
    names = {name: nn.Linear(3, 3) for name in ("fc", "xfc", "fcx")}
    return nn.ModuleDict({**names, "b": nn.ModuleDict({"fc": nn.Linear(3, 3)})})


@pytest.mark.parametrize("targets", [["fc"], ["b.fc"], ["xfc", "fc"]])
def test_targets_mean_the_layers_that_peft_means(peft, tmp_path, targets):
    lora.add_lora(ours := nested(), 2, 8, targets)
    lora.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(nested(), tmp_path / "ours", is_trainable=True)
    assert lora.count_parameters(theirs) == lora.count_parameters(ours)
    save_with_peft(peft, tmp_path, nested(), target_modules=targets)
    lora.load_adapter(model := nested(), tmp_path)
    assert lora.lora_layers(model).keys() == lora.lora_layers(ours).keys()


@pytest.mark.parametrize(
    ("targets", "excluded"),
    [("fc|xfc", None), (["fc", "xfc"], ["b.fc"]), ("all-linear", "b.*|fcx")],
)
def test_the_tensors_say_which_layers_peft_adapted(peft, refused, tmp_path, targets, excluded):
    save_with_peft(peft, tmp_path, nested(), target_modules=targets, exclude_modules=excluded)
    lora.load_adapter(model := nested(), tmp_path)
    assert set(lora.lora_layers(model)) == {"fc", "xfc"}
    with refused(model, "b.fc"):  # our list of names would mean this one, too
        lora.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


VARIANTS = [({name: True}, name) for name in ("use_rslora", "use_dora")]
VARIANTS += [({f"{kind}_pattern": {"fc1": 1}}, f"{kind}_pattern") for kind in ("rank", "alpha")]
VARIANTS += [({"init_lora_weights": "pissa"}, "init_lora_weights"), ({"bias": "all"}, "bias")]
VARIANTS += [({"lora_bias": True}, "lora_B.bias"), ({"modules_to_save": ["fc2"]}, "fc2")]


@pytest.mark.filterwarnings("ignore")  # PEFT warns of some of its own variants
@pytest.mark.parametrize(("settings", "named"), VARIANTS)
def test_what_peft_computes_in_another_way_is_refused(peft, refused, tmp_path, settings, named):
    save_with_peft(peft, tmp_path, **{"target_modules": ["fc1"], **settings})
    with refused(model := small_net(), named):
        lora.load_adapter(model, tmp_path)


# --- Faulty files ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_is_cut_or_has_more_at_its_end_is_refused(model, refused, folder, name):
    content = (folder / name).read_bytes()
    pieces = [content[:length] for length in {*range(0, len(content), 19), len(content) - 1}]
    for piece in (*pieces, content + b"{}"):
        (folder / name).write_bytes(piece)
        with refused(model, folder, "damaged"):
            lora.load_adapter(model, folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_folder_that_lacks_a_file_is_refused(model, refused, folder, name):
    (folder / name).unlink()
    for path in (folder, str(folder), folder / "none", folder / CONFIG):
        with refused(model, path, error=FileNotFoundError):
            lora.load_adapter(model, path)
    with refused(model, name, error=FileNotFoundError):
        lora.load_adapter(model, folder)


NOT_PLAIN = "use_rslora use_dora use_qalora fan_in_fan_out rank_pattern alpha_pattern".split()
NOT_PLAIN += ["alora_invocation_tokens", "layer_replication"]
SETTINGS_FAULTS = [({"r": rank}, repr(rank)) for rank in (0, 9, 2.5, "2", None)]
SETTINGS_FAULTS += [({"lora_alpha": alpha}, repr(alpha)) for alpha in (0, "3", None)]
SETTINGS_FAULTS += [({"peft_type": kind}, CONFIG) for kind in ("LOHA", None)]
SETTINGS_FAULTS += [({name: [1]}, name) for name in NOT_PLAIN] + [({"r": 1}, "(2, 6)")]
SETTINGS_FAULTS += [({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights")]


@pytest.mark.parametrize(("fault", "named"), SETTINGS_FAULTS)
def test_a_wrong_setting_is_refused_with_and_without_our_copy(model, refused, folder, fault, named):
    edit(folder, lambda config: config.update(fault))
    with refused(model, CONFIG, WEIGHTS):
        lora.load_adapter(model, folder)
    edit(folder, keep_copy=False)
    with refused(model, named):
        lora.load_adapter(model, folder)


TOO_LITTLE = [[1, 2], "LORA", None, {"r": 2, "lora_alpha": 3}, {"peft_type": "LORA", "r": 2}]


@pytest.mark.parametrize("config", [*TOO_LITTLE, {"peft_type": "LORA", "lora_alpha": 3}])
@pytest.mark.parametrize("keep_copy", [True, False])
def test_settings_that_say_too_little_are_refused(model, refused, folder, config, keep_copy):
    edit(folder, keep_copy=keep_copy)
    (folder / CONFIG).write_text(json.dumps(config))
    with refused(model, CONFIG):
        lora.load_adapter(model, folder)


def test_settings_without_effect_are_ignored(folder):
    good = factors_in(folder)
    harmless = {"use_dora": False, "rank_pattern": {}, "init_lora_weights": "gaussian", "new": 1}
    edit(folder, lambda config: config.update(harmless, target_modules=None), keep_copy=False)
    assert factors_in(folder) == good


A1, B1 = (f"base_model.model.fc1.lora_{factor}.weight" for factor in "AB")


@pytest.mark.parametrize("keep_copy", [True, False])
@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (lambda t: t.pop(A1), ["fc1.lora_A"]),
        (lambda t: t.update({A1.replace("fc1", "fc3"): torch.ones(2, 6)}), ["fc3"]),
        (lambda t: t.update({A1.replace("fc1", "relu"): torch.ones(2, 6)}), ["relu", "fc2"]),
        (lambda t: t.update({"x." + A1: t.pop(A1)}), ["x." + A1]),
        (lambda t: t.update({A1: t[A1].T.contiguous()}), ["fc1.lora_A", (6, 2), (2, 6)]),
        (lambda t: t.update({A1: t.pop(B1), B1: t.pop(A1)}), ["fc1.lora_A", (8, 2), (2, 6)]),
        (lambda t: t.update({B1: torch.ones(8, 1)}), ["fc1.lora_B", (8, 1), (8, 2)]),
        (lambda t: t.update({A1: torch.tensor(1.0)}), ["fc1.lora_A", (), (2, 6)]),
        (lambda t: t.clear(), [WEIGHTS]),
    ],
)
def test_a_wrong_tensor_is_refused(model, refused, folder, fault, named, keep_copy):
    edit(folder, factors=fault, keep_copy=keep_copy)
    with refused(model, *named):
        lora.load_adapter(model, folder)


# --- Faults while saving ---------------------------------------------------------------


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_adapter_or_a_refused_pair(
    monkeypatch, refused, folder, function, call
):
    before, calls, real = contents(folder), [], getattr(os, function)

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == call + 1:
            raise OSError("no space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, function, failing)
    with pytest.raises(OSError, match="no space"):
        lora.save_adapter(trained(1, 5), folder)
    assert contents(folder).keys() == before.keys()
    if (function, call) == ("replace", 1):
        with refused(model := small_net(), CONFIG):
            lora.load_adapter(model, folder)
    else:
        assert contents(folder) == before


@pytest.mark.parametrize("of_peft", [False, True])
@pytest.mark.parametrize(("rank", "alpha"), [(2, 3), (2, 5), (1, 3)])
def test_a_save_killed_anywhere_leaves_the_old_the_new_or_a_refused_pair(
    tmp_path, folder, of_peft, rank, alpha
):
    """Note the files at each line of the module: they are what a killed process would leave."""
    if of_peft:
        edit(folder, keep_copy=False)
    model, left, loaded = trained(rank, alpha), [], []

    def trace(frame, event, argument):
        if frame.f_code.co_filename == lora.__file__:
            if not left or left[-1] != contents(folder):
                left.append(contents(folder))
            return trace

    old = factors_in(folder)
    sys.settrace(trace)
    lora.save_adapter(model, folder)
    sys.settrace(None)
    new = factors_in(folder)
    for number, files in enumerate(left):
        (copied := tmp_path / str(number)).mkdir()
        for name, content in files.items():
            (copied / name).write_bytes(content)
        try:
            loaded.append(factors_in(copied))
        except ValueError:
            continue
    assert old in loaded and new in loaded
    assert all(adapter in (old, new) for adapter in loaded)


def test_files_are_on_the_disk_before_they_take_their_place(monkeypatch, folder):
    synced, fsync, replace = [], os.fsync, os.replace

    def noting_fsync(descriptor):
        status = os.fstat(descriptor)
        synced.append((status.st_ino, status.st_size))
        fsync(descriptor)

    def checking_replace(source, target):
        status = os.stat(source)
        assert (status.st_ino, status.st_size) in synced
        synced.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", checking_replace)
    lora.save_adapter(trained(), folder)
    assert synced.count("renamed") == 2
    assert os.name != "posix" or synced[-1][0] == folder.stat().st_ino  # the new names, too


SAVES = """
import sys, torch
from lora_utils import add_lora, save_adapter

model = torch.nn.Sequential()
model.fc1, model.fc2 = torch.nn.Linear(6, 8), torch.nn.Linear(8, 4)
add_lora(model, 2, 3, ["fc1", "fc2"])
save_adapter(model, sys.argv[1] + "/theirs")
print("ready", flush=True)
for folder in sys.stdin:
    for _ in range(10):
        save_adapter(model, folder.strip())
    print("saved", flush=True)
"""


def test_two_processes_may_save_into_one_folder_at_once(tmp_path):
    lora.save_adapter(model := trained(), tmp_path / "ours")
    command = [sys.executable, "-c", SAVES, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "ready\n"
        both = [factors_in(tmp_path / name) for name in ("ours", "theirs")]
        for number in range(10):
            folder = tmp_path / str(number)
            print(folder, file=other.stdin, flush=True)
            for _ in range(10):
                lora.save_adapter(model, folder)
            assert other.stdout.readline() == "saved\n"
            assert factors_in(folder) in both
            assert sorted(contents(folder)) == [CONFIG, WEIGHTS]
        other.stdin.close()
    assert other.returncode == 0 and both[0] != both[1]


# --- All promises, on random models ----------------------------------------------------


@pytest.mark.parametrize("seed", range(16))
def test_promises_hold_for_random_models(tmp_path, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype, tolerance = rng.choice(
        [(torch.float32, 1e-4), (torch.bfloat16, 0.15), (torch.float64, 1e-11)]
    )
    sizes = [rng.randint(1, 12) for _ in range(rng.randint(2, 5))]
    layers = [nn.Linear(i, o, dtype=dtype) for i, o in zip(sizes, sizes[1:], strict=False)]
    model = nn.Sequential(OrderedDict((f"fc{i}", layer) for i, layer in enumerate(layers)))
    names = sorted(rng.sample(list(model._modules), rng.randint(1, len(layers))))
    rank = rng.randint(1, min(min(model.get_submodule(n).weight.shape) for n in names))
    alpha, strength = rng.choice([1, 2 * rank, 0.5]), rng.uniform(-1.5, 1.5)
    x = torch.randn(rng.randint(1, 5), sizes[0], dtype=dtype)
    plain, base = copy.deepcopy(model), model(x)
    weights = copy.deepcopy(model.state_dict())
    trained(rank, alpha, names, model)
    for layer in lora.lora_layers(model).values():
        layer.lora_B.data /= 4

    adapted, factors = model(x), lora.lora_state_dict(model)
    assert adapted.dtype == dtype and not torch.equal(adapted, base)
    with lora.lora_disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), adapted)
    lora.set_lora_strength(model, strength)  # which is not saved
    lora.save_adapter(model, tmp_path)
    random_numbers = torch.get_rng_state()
    lora.load_adapter(plain, tmp_path)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert lora_show.same_tensors(plain.state_dict(), model.state_dict())
    assert torch.equal(plain(x), adapted)
    lora.remove_lora(plain)
    assert lora_show.same_tensors(plain.state_dict(), weights) and torch.equal(plain(x), base)

    hidden = x.double().numpy()
    for name in model._modules:
        weight = weights[f"{name}.weight"].double().numpy()
        if name in names:
            A, B = (factors[f"{name}.lora_{factor}"].double().numpy() for factor in "AB")
            weight = weight + strength * alpha / rank * B @ A
        hidden = hidden @ weight.T + weights[f"{name}.bias"].double().numpy()
    for _ in range(2):
        result = model(x).detach().double().numpy()
        np.testing.assert_allclose(result, hidden, rtol=tolerance, atol=tolerance)
        if lora.lora_layers(model):  # the second time without
            lora.merge_lora(model)
