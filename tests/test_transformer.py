"""LoRA in transformers, the small language model of notebook 7, and its cells on other models."""

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


def test_a_resumed_training_is_the_unbroken_one(tmp_path):
    def steps(model, first, last, state=None):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        if state:
            optimizer.load_state_dict(state)
        for seed in range(first, last):
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(1024, (2, 16), generator=generator)
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        return optimizer.state_dict()

    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    lora_utils.add_lora(model, 4, alpha=8, targets=SEVEN)
    state = steps(model, 0, 3)
    lora_utils.save_adapter(model, tmp_path / "adapter")
    torch.save(state, tmp_path / "optimizer.pt")
    steps(model, 3, 6, state)

    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    lora_utils.load_adapter(resumed, tmp_path / "adapter")
    steps(resumed, 3, 6, torch.load(tmp_path / "optimizer.pt"))
    state, expected = (lora_utils.lora_state_dict(m) for m in (resumed, model))
    torch.testing.assert_close(state, expected)


# The small language model and its sweep


def test_two_steps_of_pretraining(tmp_path):
    make_language_model.main(str(tmp_path), "2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
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


def test_training_equals_a_loop_written_by_hand():
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
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-4)


STORED = json.loads((ROOT / "data" / "language_model_sweep.json").read_text(encoding="utf-8"))


def test_the_sweep_holds_what_its_script_says():
    stored, sweep = STORED["results"], sweep_language_model
    measured = {}  # method → the rates at which it was measured on test text
    for method in sweep.METHODS:
        validation = {float(rate): bits for rate, [bits] in stored[method]["validation"].items()}
        best = min(validation, key=validation.get)
        assert min(validation) < best < max(validation), "the best rate lies inside the range"
        measured[method] = {best, *sweep.FRONTIER.get(method, ())}
    measured[sweep.CONTROL] = set(sweep.CONTROL_RATES)
    for method, rate in sweep.WEAKENED.items():
        measured |= {f"{method} × {strength}": {rate} for strength in sweep.STRENGTHS}
    assert stored.keys() == measured.keys() | {"base"}
    for method, rates in measured.items():
        for text in ("test", "Austen"):
            assert {float(rate) for rate in stored[method][text]} == rates
            assert all(len(bits) == len(sweep.RESULT) for bits in stored[method][text].values())
    assert STORED["made"]["seeds"]["test, Austen"] == list(sweep.RESULT)


def test_a_stored_training_in_full_comes_out_again():
    """Notebook 7 repeats a training with LoRA; here is its rival."""
    method = sweep_language_model.CONTROL
    model, tokenizer = sweep_language_model.adapt(method, lora_tasks.load_text("kjv")[0], 5e-4, 100)
    for name, source in (("test", "kjv"), ("Austen", "austen_prideandprejudice")):
        bits = lora_tasks.bits_per_byte(model, tokenizer, lora_tasks.load_text(source)[2])
        assert bits == pytest.approx(STORED["results"][method][name]["0.0005"][0], abs=0.01)


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


# Notebook 7 on other models

CELLS = json.loads((ROOT / "notebooks" / "07_language_model.ipynb").read_text())["cells"]


@pytest.fixture
def run_notebook(monkeypatch):
    """Return a function that runs the notebook on a model, in a fifth of the steps."""
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(model, until=None):
        names = {}
        for cell in CELLS:
            if cell["cell_type"] == "code":
                source = "".join(cell["source"])
                source = source.replace('MODEL = "language_model"', f"MODEL = {str(model)!r}")
                source = source.replace("STEPS = 120", "STEPS = 24")
                exec(compile(source, cell["id"], "exec"), names)
            if cell["id"] == until:
                break
        return names

    return run


def save(model, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)


def test_the_notebook_runs_on_another_model(run_notebook, tmp_path):
    save(tiny("qwen2"), tmp_path)
    names = run_notebook(tmp_path)
    assert not names["SMALL"] and names["model"].config.model_type == "qwen2"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma", "gemma2"])
def test_attention_by_hand_is_that_of_other_families(family, run_notebook, tmp_path):
    model = tiny(family)
    if family == "gemma2":  # scores large enough for its cap of 50 to matter
        model.model.layers[0].self_attn.q_proj.weight.data *= 3000
    save(model, tmp_path)
    names = run_notebook(tmp_path, until="attention-check")
    assert not names["SMALL"] and names["model"].config.model_type == family


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
    with pytest.raises(OSError, match="is damaged: .") as caught:
        lora_tasks.load_language_model(str(tmp_path), CPU)
    assert str(tmp_path) in str(caught.value)


def test_a_model_that_cannot_be_had_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="'nobody/nothing' is no folder"):
        lora_tasks.load_language_model("nobody/nothing", CPU)


def test_the_sweep_trains_as_the_notebook_does(run_notebook, monkeypatch):
    names = run_notebook("language_model", until="fresh")
    monkeypatch.setattr(sweep_language_model, "STEPS", 5)
    text = names["training"]["Bible"][:20_000]
    names["fresh_lora"](8, names["MLP"])
    ours = names["model"]
    lora_tasks.train_language_model(ours, names["tokenizer"], text, 5, 0.02, names["TRAINING_SEED"])
    theirs, _ = sweep_language_model.adapt("MLP", text, 0.02, names["TRAINING_SEED"])
    ours, theirs = map(lora_utils.lora_state_dict, (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
