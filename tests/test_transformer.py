"""LoRA in transformers, the small language model of notebook 7, and the notebooks on others."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lora_show
import lora_tasks
import lora_utils
from experiments import make_language_model, stored, sweep_language_model

from peft import LoraConfig, PeftModel, get_peft_model

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
BASE = ROOT / "data" / "language_model"
SEVEN = lora_tasks.ATTENTION + lora_tasks.MLP
IDS = torch.arange(40).view(2, 20) * 7
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma"]


def tiny(family, **settings):
    """A random model; in it, four queries share two keys and values."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family.startswith("gemma"):
        heads["head_dim"] = 16
    config = AutoConfig.for_model(family, **sizes | heads | ends | settings)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny(request.param)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def fill(model):
    """Give an adapted model an update that can be seen."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


# Adapters


def test_peft_opens_our_adapter(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    before = logits(model)
    lora_utils.add_lora(model, 4, alpha=8, targets=SEVEN)
    assert len(lora_utils.lora_layers(model)) == 14
    assert torch.equal(logits(model), before)
    fill(model)
    lora_utils.save_adapter(model, tmp_path / "adapter")
    base = type(model).from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.allclose(logits(theirs), logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model), before, rtol=0, atol=0.01)


def test_we_open_pefts_adapter(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    theirs = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=SEVEN))
    fill(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = type(model).from_pretrained(tmp_path / "base").eval()
    lora_utils.load_adapter(ours, tmp_path / "adapter")
    assert torch.allclose(logits(ours), logits(theirs), rtol=0, atol=1e-5)


def test_off_removed_and_merged(model):
    before, state = logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    lora_utils.add_lora(model, 4, alpha=8, targets=SEVEN)
    fill(model)
    adapted = logits(model)
    with lora_utils.lora_disabled(model):
        assert torch.equal(logits(model), before)
    factors = lora_utils.lora_state_dict(model)
    lora_utils.remove_lora(model)
    assert lora_show.same_tensors(model.state_dict(), state)
    lora_utils.add_lora(model, 4, alpha=8, targets=SEVEN)
    lora_utils.load_lora_state_dict(model, factors)
    lora_utils.merge_lora(model)
    assert torch.allclose(logits(model), adapted, rtol=0, atol=1e-4)
    assert not lora_utils.lora_layers(model)


def test_a_tied_head_cannot_be_merged(unchanged):
    model = tiny("llama", tie_word_embeddings=True)
    lora_utils.add_lora(model, 4, alpha=4, targets=["lm_head", "q_proj"])
    fill(model)
    with unchanged(model), pytest.raises(ValueError, match="embed_tokens"):
        lora_utils.merge_lora(model)


# The small language model and its sweep


def test_two_steps_of_pretraining(tmp_path):
    make_language_model.main(str(tmp_path), "2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.num_parameters() == 623_488 and model.dtype == torch.float16
    for file in tmp_path.iterdir():
        assert file.stat().st_mode & 0o777 == 0o644, file
    tokenizer, shipped = (AutoTokenizer.from_pretrained(f) for f in (tmp_path, BASE))
    assert tokenizer.get_vocab() == shipped.get_vocab()


def test_the_shipped_model_has_learnt_austen():
    model, tokenizer = lora_tasks.load_language_model("language_model", CPU)
    _, held_out = make_language_model.read_austen()
    assert 1.35 < lora_tasks.bits_per_byte(model, tokenizer, held_out) < 1.45


def test_bits_per_byte_of_a_model_that_knows_nothing_are_the_bits_of_its_vocabulary():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = tiny("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    text = "It is a truth universally acknowledged, " * 40
    tokens = tokenizer(text).input_ids
    counted = (len(tokens) - 1) // 128 * 128
    size = len(tokenizer.decode(tokens[1 : counted + 1]))
    bits = lora_tasks.bits_per_byte(model, tokenizer, text)
    assert math.isclose(bits, 10 * counted / size, rel_tol=1e-5)


def test_token_bits_are_those_of_transformers_own_loss():
    tokenizer, model = AutoTokenizer.from_pretrained(BASE), tiny("llama")
    with torch.no_grad():
        theirs = model(IDS, labels=IDS).loss
        ours = lora_tasks.token_bits(model, tokenizer, IDS)
    assert ours.shape == (2, 19) and math.isclose(ours.mean() * math.log(2), theirs, rel_tol=1e-5)


@pytest.mark.parametrize(("tokens", "least"), [(5, 65), (64, 65), (65, 65), (128, 129), (129, 129)])
def test_a_text_that_is_too_short_is_refused_with_the_number_that_is_needed(tokens, least):
    model, tokenizer = tiny("llama"), AutoTokenizer.from_pretrained(BASE)
    text = "\n" * tokens  # a token each
    assert len(tokenizer(text).input_ids) == tokens

    def use():
        if least == 65:
            assert len(lora_tasks.train_language_model(model, tokenizer, text, 1, 1e-3, 0)) == 1
        else:
            assert lora_tasks.bits_per_byte(model, tokenizer, text) > 0

    if tokens < least:
        with pytest.raises(ValueError, match=f"{tokens} tokens, {least} are needed"):
            use()
    else:
        use()


def test_training_follows_a_loop_written_by_hand():
    tokenizer, ours, theirs = AutoTokenizer.from_pretrained(BASE), tiny("llama"), tiny("llama")
    theirs.load_state_dict(ours.state_dict())
    text = lora_tasks.load_text("kjv")[0][:5000]
    losses = lora_tasks.train_language_model(ours, tokenizer, text, 4, 3e-3, seed=5)
    tokens = torch.tensor(tokenizer(text).input_ids)
    starts = torch.randint(len(tokens) - 64, (4, 8), generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.Adam(theirs.parameters())
    for step in range(4):
        pieces = torch.stack([tokens[start : start + 65] for start in starts[step]])
        loss = theirs(pieces, labels=pieces).loss / math.log(2)
        assert math.isclose(losses[step], loss.item(), rel_tol=1e-3)
        optimizer.param_groups[0]["lr"] = 3e-3 * (4 - step) / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[3] < losses[0] - 0.1


STORED = json.loads((ROOT / "data" / "language_model_sweep.json").read_text(encoding="utf-8"))


def test_the_sweep_holds_what_its_script_says():
    found, sweep = STORED["results"], sweep_language_model
    alphas = [name for name in sweep.METHODS if name.startswith("r = 64")]
    best_alpha = min(alphas, key=lambda name: min(found["validation"][name].values()))
    assert found["validation"].keys() == sweep.METHODS.keys()
    assert found["test"].keys() == sweep.METHODS.keys() - set(alphas) | {best_alpha}
    for name, method in sweep.METHODS.items():
        tried = {float(rate): bits for rate, bits in found["validation"][name].items()}
        best = min(tried, key=tried.get)
        assert min(tried) < best < max(tried), "the best rate lies inside the range"
        if name not in found["test"]:
            continue
        count = 3 if name == best_alpha else method.count
        rates = {f"{best / 2**k:g}" for k in range(count)}
        assert found["test"][name].keys() == rates
        for strengths in found["test"][name].values():
            assert list(strengths) == (["1", "0.75", "0.5"] if count > 1 else ["1"])
            for texts in strengths.values():
                assert [len(bits) for bits in texts.values()] == [len(sweep.RESULT)] * 2
    assert STORED["made"]["test seeds"] == list(sweep.RESULT)


def test_all_methods_under_a_seed_see_the_same_batches_and_start_as_the_base(monkeypatch):
    """What makes their runs pairs. Where they get to differs from processor to processor."""
    sweep, token_bits = sweep_language_model, lora_tasks.token_bits
    base, tokenizer = lora_tasks.load_language_model("language_model", CPU)
    text, seen = lora_tasks.load_text("kjv")[0][:20_000], []

    def spy(model, tokenizer, windows):
        bits = token_bits(model, tokenizer, windows)
        seen.append((windows, bits.mean().item(), copy.deepcopy(model)))
        return bits

    monkeypatch.setattr(lora_tasks, "token_bits", spy)
    changes = [sweep.lora(4, 4), sweep.lora(64, 64), sweep.seven_layers, sweep.everything]
    for change in changes:
        sweep.adapt(base, tokenizer, text, change, 1e-3, seed=7, steps=2)
    (first, loss, start), (second, _, _), *others = seen
    assert not first.equal(second)
    for i, (windows, other_loss, _) in enumerate(others):
        assert windows.equal(second if i % 2 else first)
        if i % 2 == 0:
            assert other_loss == pytest.approx(loss, rel=1e-4)
    torch.manual_seed(7)
    lora_utils.add_lora(base, 4, alpha=4, targets=SEVEN)
    factors = lora_utils.lora_state_dict(start)
    assert lora_show.same_tensors(factors, lora_utils.lora_state_dict(base))


def test_each_change_trains_what_it_names():
    base, _ = lora_tasks.load_language_model("language_model", CPU)
    counts = {}
    for name, method in sweep_language_model.METHODS.items():
        model = copy.deepcopy(base)
        method.change(model)
        counts[name] = lora_utils.count_parameters(model).trainable
    equal = {counts[name] for name in ("query, value", "attention", "MLP")}
    assert equal == {27_648} and counts["r = 4, α = 4"] == 26_112
    assert counts["all weights in full"] == 623_488
    assert counts["seven layers in full"] == 623_488 - 1024 * 128 - 7 * 128  # table and norms


@torch.no_grad()
@pytest.mark.parametrize("change", [sweep_language_model.lora(4, 4), lambda model: None])
def test_weakened_by_half_half_of_the_change_is_left(change):
    base = tiny("llama")
    model = copy.deepcopy(base)
    change(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or not lora_utils.lora_layers(model):
            parameter += 0.1
    name = "model.layers.1.mlp.up_proj.weight"
    W0 = base.get_parameter(name)
    trained = model.get_submodule(name.removesuffix(".weight")).weight - W0
    sweep_language_model.weaken(model, base, 0.5)
    left = model.get_submodule(name.removesuffix(".weight")).weight - W0
    torch.testing.assert_close(left, trained / 2, rtol=1e-4, atol=1e-6)


def test_a_stored_training_comes_out_again():
    """Within MARGIN: what other instruction sets and threads were seen to change, five times."""
    sweep, base = sweep_language_model, lora_tasks.load_language_model("language_model", CPU)
    stored = STORED["results"]["test"][sweep.IN_FULL]
    rate = min(stored, key=float)
    change, text = sweep.seven_layers, lora_tasks.load_text("kjv")[0]
    model = sweep.adapt(*base, text, change, float(rate), sweep.RESULT[0])
    for name, source in (("Bible", "kjv"), ("Austen", "austen_prideandprejudice")):
        bits = lora_tasks.bits_per_byte(model, base[1], lora_tasks.load_text(source)[2])
        assert bits == pytest.approx(stored[rate]["1"][name][0], abs=0.01)


def test_what_a_sweep_stores_can_be_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "DATA", tmp_path)
    results = {
        "α": [1.5, 2],
        "long": {f"rate {i}": list(range(20)) for i in range(9)},
        "none": None,
    }
    stored.store("a.json", results, 12.3, seeds=(1, 2))
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    read = json.loads(text)
    assert read["results"] == results and max(map(len, text.splitlines())) <= 120
    made = read["made"]
    assert made["seconds"] == 12 and made["seeds"] == [1, 2]
    assert made["versions"]["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# The notebooks on other models


@pytest.fixture
def run_notebook(monkeypatch):
    """Return a function that runs a notebook on a model, in few steps, and returns its names."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(path, model, until=None):
        path, names = ROOT / "notebooks" / path, {}
        monkeypatch.chdir(path.parent)
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                source = "".join(cell["source"])
                source = source.replace('MODEL = "language_model"', f"MODEL = {str(model)!r}")
                source = source.replace("STEPS = 120", "STEPS = 4")
                exec(compile(source, cell["id"], "exec"), names)
            if cell["id"] == until:
                break
        assert names["model"].config.model_type == model.name
        return names

    return run


def save(model, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)


def test_the_notebook_runs_on_another_model(run_notebook, tmp_path):
    save(tiny("qwen2"), tmp_path / "qwen2")
    run_notebook("07_language_model.ipynb", tmp_path / "qwen2")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma"])
def test_attention_by_hand_is_that_of_other_families(family, run_notebook, tmp_path):
    save(tiny(family), tmp_path / family)
    run_notebook("deeper/07_inside_a_transformer.ipynb", tmp_path / family, "attention-check")


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_fused_layers_are_refused_by_name(family, tmp_path):
    save(tiny(family), tmp_path)
    with pytest.raises(ValueError, match=r"no linear layers .*'q_proj'.*take a dense Llama"):
        lora_tasks.load_language_model(str(tmp_path), CPU)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_that_lora_would_not_reach_are_refused_by_name(family, tmp_path):
    sizes = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32}
    model = tiny(family, **sizes, mlp_only_layers=[0], shared_expert_intermediate_size=32)
    if all(parameter.ndim < 3 for parameter in model.parameters()):
        pytest.skip("this transformers keeps experts in linear layers, which LoRA reaches")
    save(model, tmp_path)
    with pytest.raises(ValueError, match=r"in no linear layer, as .*experts.*take a dense Llama"):
        lora_tasks.load_language_model(str(tmp_path), CPU)


@pytest.mark.parametrize("damage", ["weights", "settings", "tokenizer"])
def test_a_damaged_folder_is_named(damage, tmp_path):
    save(tiny("llama"), tmp_path)
    files = {"weights": "model.safetensors", "settings": "config.json"}
    (tmp_path / files.get(damage, "tokenizer.json")).write_text("version https://git-lfs", "utf-8")
    with pytest.raises(OSError, match="(?s)is damaged: .") as caught:
        lora_tasks.load_language_model(str(tmp_path), CPU)
    assert str(tmp_path) in str(caught.value)


def test_a_model_that_cannot_be_had_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="'nobody/nothing' is no folder"):
        lora_tasks.load_language_model("nobody/nothing", CPU)
