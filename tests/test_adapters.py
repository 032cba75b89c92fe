"""Adapter files: PEFT reads and writes the same, and no fault loads silently."""

import copy
import json
import random
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
    """Change an adapter's files; keep_copy=False drops the metadata, as others do."""
    config = json.loads((folder / CONFIG).read_text())
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata() if keep_copy else None
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
        (lambda s: s.update({"fc2.lora_B": np.ones((4, 2))}), ["fc2.lora_B", "array"]),
        (lambda s: s.update({"fc2.lora_B": torch.ones(4, 2).int()}), ["fc2.lora_B", "tensor([[1"]),
        (lambda s: s.update({"fc2.lora_B": s["fc2.lora_B"].to("meta")}), ["fc2.lora_B", "meta"]),
        (lambda s: s["fc2.lora_B"].fill_(torch.nan), ["fc2.lora_B", "NaN"]),
        (lambda s: s.update({"fc2.lora_B": torch.ones(4, 2).double() * 1e300}), ["infinity"]),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(refused, fault, named):
    state = lora.lora_state_dict(trained())
    fault(state)
    with refused(model := trained(), *named):
        lora.load_lora_state_dict(model, state)


def test_numbers_are_never_copied_to_where_none_are_kept(refused, folder):
    state = lora.lora_state_dict(trained())
    with torch.device("meta"):
        plain, adapted = small_net(), trained()
    accelerate = pytest.importorskip("accelerate")
    of_accelerate = accelerate.cpu_offload(small_net(), torch.device("cpu"))
    for model in (plain, adapted, of_accelerate):
        with refused(model, "fc1", "offloaded"):
            lora.load_adapter(model, folder)
    with refused(of_accelerate, "fc1", "offloaded"):
        lora.add_lora(of_accelerate, 1, 1, ["fc1"])
    with refused(adapted, "meta"):
        lora.load_lora_state_dict(adapted, state)
    with refused(adapted, "whole tensor of floats"):
        lora.save_adapter(adapted, folder)


def test_a_loaded_adapter_no_longer_hangs_on_its_file(folder):
    lora.load_adapter(model := small_net(), folder)
    before, size = lora.lora_state_dict(model), (folder / WEIGHTS).stat().st_size
    with (folder / WEIGHTS).open("r+b") as file:  # in place
        file.write(b"\xff" * size)
    assert lora_show.same_tensors(lora.lora_state_dict(model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_load_takes_factors_of_any_float_and_keeps_their_precision(folder, dtype):
    expected = factors_in(folder)[1]
    edit(folder, factors=lambda t: t.update({name: t[name].to(dtype) for name in t}))
    for base in (torch.bfloat16, torch.float64):
        lora.load_adapter(model := small_net(base), folder)
        state = lora.lora_state_dict(model)
        assert all(t.dtype == torch.promote_types(base, torch.float32) for t in state.values())
        for name, numbers in expected.items():
            assert torch.allclose(state[name].float(), torch.tensor(numbers), rtol=0.01)


def test_load_replaces_the_lora_that_is_there(folder):
    model = trained(4, 9, ["fc1"])
    weight = model.requires_grad_(True).fc1.base.weight
    lora.load_adapter(model, folder)
    assert model.fc1.base.weight is weight and list(lora.lora_layers(model)) == ["fc1", "fc2"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {*factors_in(folder)[1]}
    lora.save_adapter(trained(targets=["fc2"]), folder)
    lora.load_adapter(model, folder)
    assert type(model.fc1) is nn.Linear and list(lora.lora_layers(model)) == ["fc2"]


@pytest.mark.parametrize(
    ("rank", "alpha", "targets"),
    [(2, 3, ["fc1", "fc2"]), (1, 3, ["fc1", "fc2"]), (2, 5, ["fc1", "fc2"]), (2, 3, ["fc2"])],
)
def test_an_optimizer_goes_on_if_the_settings_are_those_of_the_file(folder, rank, alpha, targets):
    model = trained(rank, alpha, targets)
    lora.set_lora_strength(model, 0.5)
    known = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(known, lr=0.1)
    lora.load_adapter(model, folder)
    loaded = lora.lora_state_dict(model)
    assert {name: t.tolist() for name, t in loaded.items()} == factors_in(folder)[1]
    assert (model.fc2.rank, model.fc2.alpha, model.fc2.strength) == (2, 3, 1)
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    same = (rank, alpha, len(targets)) == (2, 3, 2)
    assert lora_show.same_tensors(lora.lora_state_dict(model), loaded) != same


@pytest.mark.parametrize(("rank", "alpha"), [(1, 3), (2, 4)])
def test_layers_of_different_settings_cannot_be_saved_together(refused, tmp_path, rank, alpha):
    model = trained(rank, alpha, ["fc2"], trained(2, 3, ["fc1"]))
    with refused(model, (rank, alpha), (2, 3)):
        lora.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Spread(torch.Tensor):
    """A tensor with a type of its own, as DTensor has."""


@pytest.mark.parametrize("fault", ["NaN", "infinity", "Spread"])
def test_a_factor_that_no_file_can_hold_is_not_saved(refused, tmp_path, fault):
    model = trained()
    factor = model.fc2.lora_A
    if fault == "Spread":
        model.fc2.lora_A = nn.Parameter(factor.detach().as_subclass(Spread))
    else:
        factor.data[1, 3] = torch.nan if fault == "NaN" else -torch.inf
    with refused(model, "fc2.lora_A", fault):
        lora.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_factors_in_any_layout_and_shared_ones_are_saved(tmp_path):
    model = trained(model=nn.Sequential(OrderedDict(fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 8))))
    model.fc1.lora_A = model.fc2.lora_A = nn.Parameter(torch.randn(8, 2).T)
    lora.save_adapter(model, tmp_path)
    lora.load_adapter(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    for name in ("fc1", "fc2"):
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], model.fc1.lora_A)


# --- Parity with PEFT ------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft():
    import peft  # imports transformers: several seconds

    return peft


def save_with_peft(peft, folder, model, **settings):
    settings = {"r": 2, "init_lora_weights": False, **settings}
    peft.get_peft_model(model, peft.LoraConfig(**settings)).save_pretrained(folder)


SETTINGS = [(1, 2, ["fc1", "fc2"]), (4, 16, ["fc2"]), (20, 1, ["fc1"])]  # 20: more than 6, 8


@pytest.mark.parametrize(("rank", "alpha", "targets"), SETTINGS)
def test_peft_loads_what_we_save_and_we_what_peft_saves(peft, tmp_path, rank, alpha, targets):
    plain, x = small_net(), torch.randn(5, 6)
    ours = trained(rank, alpha, targets, copy.deepcopy(plain))
    lora.save_adapter(ours, str(folder := tmp_path / "new" / "folder"))
    assert json.loads((folder / CONFIG).read_text()).keys() <= peft.LoraConfig().to_dict().keys()
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata()["format"] == "pt"  # transformers asks for it
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(folder), is_trainable=True)
    theirs.save_pretrained(tmp_path / "theirs")
    lora.load_adapter(loaded := copy.deepcopy(plain), tmp_path / "theirs")
    for model in (ours, loaded):
        assert list(lora.lora_layers(model)) == targets
        assert lora.count_parameters(theirs) == lora.count_parameters(model)
        torch.testing.assert_close(theirs(x), model(x))
        with lora.lora_disabled(model), theirs.disable_adapter():
            assert torch.equal(theirs(x), model(x))
        lora.merge_lora(model)
    torch.testing.assert_close(ours.state_dict(), theirs.merge_and_unload().state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_training_steps_are_those_of_peft(peft, tmp_path, dtype):
    plain, x = small_net(dtype), torch.randn(5, 6, dtype=dtype)
    lora.save_adapter(ours := trained(model=copy.deepcopy(plain)), tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    assert {p.dtype for p in ours.parameters()} == {p.dtype for p in theirs.parameters()}
    exactly = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    for _ in range(3):
        for model in (ours, theirs):
            torch.testing.assert_close(ours(x), theirs(x), **exactly)
            model.zero_grad()
            model(x).float().square().sum().backward()
        for model in (ours, theirs):
            torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2).step()
    for name, factor in theirs.named_parameters():
        if "lora_" in name:
            name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            torch.testing.assert_close(ours.get_parameter(name), factor)


def tiny(kind):
    import transformers

    if kind == "T5":  # asks for wo.weight.dtype
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
        return transformers.T5EncoderModel(transformers.T5Config(vocab_size=32, **sizes)).eval()
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "Bloom":  # multiplies by slices of dense.weight
        config = transformers.BloomConfig(pretraining_tp=2, slow_but_exact=True, **sizes)
    else:
        config = transformers.LlamaConfig(intermediate_size=24, num_key_value_heads=1, **sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("kind", "target"), [("T5", "wo"), ("Bloom", "dense"), ("Llama", "lm_head")]
)
def test_models_that_read_a_weight_see_the_update(peft, kind, target):
    model, ids = tiny(kind), torch.tensor([[1, 2, 3]])
    base = model(ids)[0]
    adapted = trained(2, 8, [target], model)(ids)[0]
    assert not torch.allclose(adapted, base, atol=1e-3)
    if kind == "Llama":
        head = model.get_output_embeddings()
        assert torch.equal(head.weight, head.base.weight + head.delta_W())
    lora.merge_lora(model)
    torch.testing.assert_close(model(ids)[0], adapted)


def test_the_auto_classes_of_peft_find_the_base(peft, refused, tmp_path):
    import transformers

    tiny("Llama").save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trained(2, 8, ["q_proj", "v_proj"], model)
    lora.save_adapter(model, folder := tmp_path / "adapter")
    ids = torch.tensor([[1, 2, 3]])
    for auto in (peft.AutoPeftModelForCausalLM, peft.AutoPeftModel):
        theirs = auto.from_pretrained(folder)
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits)
    with refused(wrong := tiny("Llama").model, "'model.layers.0.self_attn.q_proj'", "there are"):
        lora.load_adapter(wrong, folder)
    # Where the base lies is not what the adapter computes: it may be edited.
    edit(folder, lambda config: config.update(base_model_name_or_path="on/the-hub"))
    lora.load_adapter(model, folder)


def nested():
    names = {name: nn.Linear(3, 3) for name in ("fc", "xfc", "fcx")}
    return nn.ModuleDict({**names, "b": nn.ModuleDict({"fc": nn.Linear(3, 3)})})


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
    save_with_peft(peft, tmp_path, small_net(), target_modules=["fc1"], **settings)
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
    (folder / "adapter_model.bin").touch()  # of an older PEFT
    with refused(model, name, "adapter_model.bin", error=FileNotFoundError):
        lora.load_adapter(model, folder)


def test_a_pointer_of_git_lfs_is_called_so(model, refused, folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with refused(model, folder, "git lfs pull"):
        lora.load_adapter(model, folder)


@pytest.mark.parametrize("settings", ["{", "[1]", "5", "null"])
def test_a_damaged_copy_of_the_settings_is_refused(model, refused, folder, settings):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={CONFIG: settings})
    with refused(model, folder, "damaged"):
        lora.load_adapter(model, folder)


SETTINGS_FAULTS = [({"r": rank}, repr(rank)) for rank in (0, 2.5, "2", None, True)]
SETTINGS_FAULTS += [({"r": rank}, "(2, 6)") for rank in (9, 10**9)]
SETTINGS_FAULTS += [({"lora_alpha": alpha}, repr(alpha)) for alpha in (0, "3", None)]
SETTINGS_FAULTS += [({"peft_type": kind}, CONFIG) for kind in ("LOHA", None)]
EXTRAS = [({name: [1]}, name) for name in lora.NOT_PLAIN_LORA]
EXTRAS += [({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights")]


@pytest.mark.parametrize(("fault", "named"), SETTINGS_FAULTS + EXTRAS)
def test_a_wrong_setting_is_refused_with_and_without_our_copy(model, refused, folder, fault, named):
    edit(folder, lambda config: config.update(fault))
    with refused(model, named if (fault, named) in EXTRAS else CONFIG):
        lora.load_adapter(model, folder)
    edit(folder, keep_copy=False)
    with refused(model, named):
        lora.load_adapter(model, folder)


COMPLETE = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}
TOO_LITTLE = [{key: COMPLETE[key] for key in COMPLETE if key != missing} for missing in COMPLETE]


@pytest.mark.parametrize("keep_copy", [True, False])
def test_settings_that_say_too_little_are_refused(model, refused, folder, keep_copy):
    edit(folder, keep_copy=keep_copy)
    for config in ([1, 2], "LORA", None, *TOO_LITTLE):
        (folder / CONFIG).write_text(json.dumps(config))
        with refused(model, CONFIG, "does not describe"):
            lora.load_adapter(model, folder)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_settings_without_effect_are_ignored(folder, start):
    good = factors_in(folder)
    harmless = {"use_dora": False, "rank_pattern": {}, "init_lora_weights": start, "new": 1}
    edit(folder, lambda config: config.update(harmless, target_modules=None), keep_copy=False)
    assert factors_in(folder) == good


A1, B1 = (f"base_model.model.fc1.lora_{factor}.weight" for factor in "AB")


@pytest.mark.parametrize("keep_copy", [True, False])
@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (lambda t: t.pop(A1), ["fc1.lora_A"]),
        (lambda t: t.update({A1.replace("fc1", "fc3"): torch.ones(2, 6)}), ["fc3", "fc1, fc2"]),
        (lambda t: t.update({A1.replace("fc1", "a.fc1"): torch.ones(2, 6)}), ["a.fc1", "are fc1"]),
        (lambda t: t.update({A1: t[A1].to(torch.int8)}), ["fc1.lora_A", "floats"]),
        (lambda t: t[A1].fill_(torch.inf), ["fc1.lora_A", "infinity"]),
        (lambda t: t.update({A1.replace("fc1", "relu"): torch.ones(2, 6)}), ["relu", "fc2"]),
        (lambda t: t.update({"x." + A1: t.pop(A1)}), ["x." + A1]),
        (lambda t: t.update({A1 + ".x": t.pop(A1)}), [A1 + ".x"]),
        (lambda t: t.update({A1.replace("_A.", "_C."): t.pop(A1)}), ["lora_C"]),
        (lambda t: t.update({A1: t[A1].T.contiguous()}), ["fc1.lora_A", (6, 2), (2, 6)]),
        (lambda t: t.update({A1: t.pop(B1), B1: t.pop(A1)}), ["fc1.lora_A", (8, 2), (2, 6)]),
        (lambda t: t.update({B1: torch.ones(8, 1)}), ["fc1.lora_B", (8, 1), (8, 2)]),
        (lambda t: t.update({A1: torch.tensor(1.0)}), ["fc1.lora_A", (), (2, 6)]),
        (lambda t: t.clear(), ["no factors"]),
    ],
)
def test_a_wrong_tensor_is_refused(model, refused, folder, fault, named, keep_copy):
    edit(folder, factors=fault, keep_copy=keep_copy)
    with refused(model, *named):
        lora.load_adapter(model, folder)


# --- Faults while saving ---------------------------------------------------------------


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
    rank = rng.randint(1, 8)
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
