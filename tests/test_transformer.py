"""LoRA in transformers, the small language model of notebook 7, and its cells on other models."""

import csv
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lora_show
import lora_tasks
import lora_utils
from experiments import make_language_model, sweep_language_model

ROOT = Path(__file__).resolve().parents[1]
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
    assert lora_show.same_tensors(state, expected)


# The small language model and its sweep


def test_two_steps_of_pretraining(tmp_path, capsys):
    make_language_model.main(str(tmp_path), "2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.num_parameters() == 623_488 and model.dtype == torch.float16
    for file in tmp_path.iterdir():
        assert file.stat().st_mode & 0o777 == 0o644, file
    card = (tmp_path / "README.md").read_text()
    assert hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest() in card
    tokenizer, shipped = (AutoTokenizer.from_pretrained(f) for f in (tmp_path, BASE))
    assert tokenizer.get_vocab() == shipped.get_vocab()


def test_the_shipped_model_has_learnt_austen():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE).float()
    _, held_out = make_language_model.read_austen()
    assert make_language_model.bits_per_byte(model, tokenizer, held_out) < 1.45
    checksum = hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()
    assert checksum in (BASE / "README.md").read_text()


def test_bits_per_byte_of_a_model_that_knows_nothing_are_the_bits_of_its_vocabulary():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = tiny("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    text = "It is a truth universally acknowledged, " * 40
    tokens = tokenizer(text).input_ids
    counted = (len(tokens) - 1) // 128 * 128
    size = len(tokenizer.decode(tokens[1 : counted + 1]))
    for module in (make_language_model, lora_utils):
        bits = module.bits_per_byte(model, tokenizer, text)
        assert math.isclose(bits, 10 * counted / size, rel_tol=1e-5)


def test_the_sweep_holds_what_its_script_says():
    with open(ROOT / "data" / "language_model_sweep.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for method in sweep_language_model.METHODS:
        seeds = {}
        for row in (row for row in rows if row["method"] == method):
            key = row["text"], float(row["rate"])
            seeds.setdefault(key, {})[int(row["seed"])] = float(row["bits per byte"])
        validation = {rate: sum(b.values()) for (text, rate), b in seeds.items() if text[0] == "v"}
        best = min(validation, key=validation.get)
        assert min(validation) < best < max(validation), "the best rate lies inside the range"
        for rate in {best, *sweep_language_model.FRONTIER.get(method, ())}:
            for text in ("test", "Austen"):
                assert sorted(seeds[text, rate]) == sorted(sweep_language_model.RESULT)
    for method, rate in sweep_language_model.WEAKENED.items():
        for strength in sweep_language_model.STRENGTHS:
            weaker = [r for r in rows if r["method"] == f"{method} × {strength}"]
            assert len(weaker) == 2 * len(sweep_language_model.RESULT)
            assert {float(row["rate"]) for row in weaker} == {rate}
    for rate in sweep_language_model.CONTROL_RATES:
        for text in ("test", "Austen"):
            control = (r for r in rows if r["method"] == sweep_language_model.CONTROL)
            found = {
                int(r["seed"]) for r in control if r["text"] == text and float(r["rate"]) == rate
            }
            assert found == set(sweep_language_model.RESULT)


@pytest.mark.parametrize("method", ["full", sweep_language_model.CONTROL])
def test_a_stored_training_in_full_comes_out_again(method):
    """Notebook 7 repeats a training with LoRA; here are the two that beat it."""
    with open(ROOT / "data" / "language_model_sweep.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    model, tokenizer = sweep_language_model.adapt(method, lora_tasks.load_text("kjv")[0], 5e-4, 100)
    texts = {
        "test": lora_tasks.load_text("kjv")[2],
        "Austen": lora_tasks.load_text("austen_prideandprejudice")[2],
    }
    for name, text in texts.items():
        key = {"method": method, "rate": "0.0005", "seed": "100", "text": name}
        (stored,) = (r["bits per byte"] for r in rows if key.items() <= r.items())
        bits = lora_tasks.bits_per_byte(model, tokenizer, text)
        assert bits == pytest.approx(float(stored), abs=0.005)


# Notebook 7 on other models

CELLS = json.loads((ROOT / "notebooks" / "07_transformer.ipynb").read_text())["cells"]


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
def test_fused_layers_are_refused_by_name(family, run_notebook, tmp_path):
    save(tiny(family), tmp_path)
    with pytest.raises(ValueError, match=r"no linear layers .*'q_proj'.*take a Llama"):
        run_notebook(tmp_path)


def test_a_model_that_cannot_be_had_is_named(run_notebook):
    with pytest.raises(OSError, match="'nobody/nothing' is no folder"):
        run_notebook("nobody/nothing")


def test_the_sweep_trains_as_the_notebook_does(run_notebook, monkeypatch):
    names = run_notebook("language_model", until="fresh")
    monkeypatch.setattr(sweep_language_model, "STEPS", names["STEPS"])
    text = names["training"]["Bible"][:20_000]
    names["fresh_lora"](8, names["MLP"])
    ours = names["model"]
    lora_tasks.train_language_model(
        ours, names["tokenizer"], text, names["STEPS"], 0.02, names["TRAINING_SEED"]
    )
    theirs, _ = sweep_language_model.adapt("MLP", text, 0.02, names["TRAINING_SEED"])
    ours, theirs = map(lora_utils.lora_state_dict, (ours, theirs))
    assert lora_show.same_tensors(ours, theirs)
