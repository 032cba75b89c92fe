"""The language playground tokenizes and computes as transformers does, and shows what it means."""

import gzip
import json

import pytest
import safetensors.torch
import torch

import pages
from lora_tasks import DATA, load_language_model
from lora_utils import CONFIG_FILE, WEIGHTS_FILE, load_adapter, lora_layers
from playground import dequantised

SETTINGS = [[0, 0], [1, 0], [0, 1], [0.5, 0.5], [1.5, -1]]  # of the Bible and of Shakespeare
PROMPTS = [
    "In the morning",
    "And God said unto",
    "ROSALIND. I pray you, what is't o'clock?",
    "It is a truth universally acknowledged, that a single man",
    "12 of the 144,000 went; 3 came back (so he said).",
    "naïve Σ≈π — “quoted” 日本 🙂",
    "  two spaces\n\nand\ttabs \n",
    "He'd have said they're gone, I'm sure we'll see.",
    "a",
    "The Lord " * 40,
]


@pytest.fixture
def page(open_tool):
    return open_tool("language")


@pytest.fixture(scope="module")
def model():
    """The base with its weights as the page has them, and its tokenizer."""
    model, tokenizer = load_language_model("language_model", torch.device("cpu"))
    return dequantised(model), tokenizer


def texts():
    return {path.name: gzip.decompress(path.read_bytes()) for path in DATA.glob("texts/*.gz")}


@pytest.mark.parametrize("most", [30_000, pytest.param(None, marks=pytest.mark.slow)])
def test_tokens_are_those_of_the_library(page, model, most):
    for name, raw in texts().items():
        text = raw.decode()[:most]
        theirs = model[1](text, add_special_tokens=False).input_ids
        assert page.evaluate("text => tokenizer.encode(text)", text) == theirs, name
    for prompt in PROMPTS:
        ours = page.evaluate("text => tokenizer.encode(text)", prompt)
        assert ours == model[1](prompt, add_special_tokens=False).input_ids, prompt
        assert page.evaluate("text => tokenizer.decode(tokenizer.encode(text))", prompt) == prompt


@torch.no_grad()
def test_logits_are_those_of_transformers(page, model, tmp_path):
    base, tokenizer = model
    stored = safetensors.torch.load(pages.LANGUAGE.read_bytes())
    with safetensors.safe_open(pages.LANGUAGE, "pt") as file:
        settings = json.loads(file.metadata()["adapters"])
    updates = []
    for name in ("Bible", "Shakespeare"):
        (tmp_path / name).mkdir()
        mine = {k.partition("/")[2]: v for k, v in stored.items() if k.startswith(f"{name}/")}
        mine = {key: tensor.float() for key, tensor in mine.items()}
        safetensors.torch.save_file(mine, tmp_path / name / WEIGHTS_FILE)
        (tmp_path / name / CONFIG_FILE).write_text(json.dumps(settings[name]))
        adapted = load_language_model("language_model", torch.device("cpu"))[0]
        load_adapter(adapted, tmp_path / name)
        updates.append({n: layer.delta_W() for n, layer in lora_layers(adapted).items()})
    largest = 0.0
    for strengths in SETTINGS:
        summed = dequantised(base)
        for strength, update in zip(strengths, updates, strict=True):
            for name, delta in update.items():
                summed.get_submodule(name).weight.data += strength * delta
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
            theirs = summed(ids).logits[0]
            ours = page.evaluate(
                """([ids, strengths]) => {
                  const mix = knobs.map(({ adapter }, i) => [adapter, strengths[i]]);
                  const model = merged(base, mix), cache = newCache(model);
                  const some = Math.ceil(ids.length / 2); // in two parts, by way of the cache
                  const first = forwardLlama(model, ids.slice(0, some), cache);
                  return [...first, ...forwardLlama(model, ids.slice(some), cache)];
                }""",
                [ids[0].tolist(), strengths],
            )
            difference = (torch.tensor(ours).view(theirs.shape) - theirs).abs().max()
            largest = max(largest, difference.item())
    print(f"largest difference of a logit: {largest:.1e}")
    assert largest < 1e-4


def settle(page):
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")


def test_knobs_colour_the_words_and_say_it_in_numbers(page):
    page.locator("#text").fill("And God said unto him, Emma was very agreeable.")
    page.get_by_role("button", name="Bible at 1").click()
    settle(page)
    spans = page.locator("#tokens span")
    assert "".join(spans.all_inner_texts()) == page.input_value("#text")
    gains = page.evaluate("gains")
    assert spans.count() == len(gains) + 1
    for i, gain in enumerate(gains):
        look = spans.nth(i + 1).get_attribute("class")
        assert ("gain" in look) == (gain >= 0.1) and ("harder" in look) == (gain <= -0.1)
    page.locator("#tokens").focus()
    page.keyboard.press("ArrowRight")
    assert "the first: nothing stands before it" in page.inner_text("#one")
    page.keyboard.press("ArrowRight")
    assert "bits alone" in page.inner_text("#one")
    assert f"{page.evaluate('known.bits[0]'):.1f} bits alone" in page.inner_text("#one")
    saved = sum(gains)
    more = "fewer" if saved > 0 else "more"
    assert f"it needs {abs(saved):.0f} {more}" in page.inner_text("#sum")
    for start, adapter in (("Genesis", "Bible"), ("Stage", "Shakespeare")):  # each its own text
        page.get_by_role("button", name=start).click()
        page.get_by_role("button", name=f"{adapter} at 1").click()
        settle(page)
        assert page.evaluate("gains.reduce((a, b) => a + b)") > 10
    for text in ("", "a", "日"):  # nothing, one token, several tokens of one letter
        page.locator("#text").fill(text)
        settle(page)
        assert "�" not in page.inner_text("main")
    text = "naïve 漢字 😀 привет"  # a box for each letter, whatever it takes of tokens
    page.locator("#text").fill(text)
    settle(page)
    assert "".join(spans.all_inner_texts()) == text
    spans.filter(has_text="😀").click()
    cost = page.evaluate("known.bits.slice(...boxes[chosen].map((at) => at - 1))")
    assert len(cost) == 4 and f"“😀”: {sum(cost):.1f} bits alone" in page.inner_text("#one")
    page.locator("#text").fill("a b c " * 100)
    settle(page)
    assert spans.count() == 128 and page.get_by_text("first 128 tokens").is_visible()


def test_a_button_is_pressed_while_its_state_stands(page):
    pressed = page.locator("[aria-pressed=true]")
    assert pressed.all_inner_texts() == ["Mixed", "Bible at 1"]
    page.locator("#text").fill("And God said unt")
    settle(page)
    shares = page.locator("#likeliest td").all_inner_texts()
    assert "<1 %" in shares and "0 %" not in shares
    page.get_by_role("button", name="Mixed").click()
    page.get_by_role("button", name="Bible, backwards").click()
    settle(page)
    assert pressed.all_inner_texts() == ["Mixed", "Bible, backwards"]
    page.get_by_role("slider", name="Shakespeare").fill("1.05")
    page.locator("#text").fill("Emma was so ver")
    settle(page)
    assert pressed.count() == 0
    page.get_by_role("slider", name="Shakespeare").fill("0")
    settle(page)
    assert pressed.all_inner_texts() == ["Bible, backwards"]


def test_it_writes_sixty_tokens_twice_with_the_same_dice(page):
    texts = []
    for button in ("Write sixty tokens", "Write sixty tokens", "With other dice"):
        page.get_by_role("button", name=button).click()
        page.wait_for_function("!document.getElementById('alone').textContent.endsWith('…')")
        page.wait_for_timeout(100)
        page.wait_for_function(
            """() => {
              const text = document.getElementById("adapted").textContent;
              const isDone = text === globalThis.before;
              globalThis.before = text;
              return isDone;
            }""",
            polling=500,
        )
        texts.append([page.inner_text("#alone"), page.inner_text("#adapted")])
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]
    assert all(len(text) > len(page.input_value("#text")) + 60 for text in texts[0])
    page.get_by_role("button", name="Shakespeare at 1").click()
    age = page.get_by_text("Written at Bible 1, temperature 0.8; write again.")
    age.wait_for()
    assert page.locator(".stale .written").count() == 2
    page.get_by_role("button", name="Bible at 1").click()  # back: it is not old any more
    age.wait_for(state="hidden")
    page.locator("#text").fill("And it came to pass")
    age.wait_for()
    page.get_by_role("button", name="Write sixty tokens").click()
    age.wait_for(state="hidden")
    assert page.locator(".stale").count() == 0


def test_128_tokens_are_coloured_at_once(page):
    took = page.evaluate(
        """() => {
          const start = performance.now(), ids = Array.from({ length: 128 }, (_, i) => 10 + i);
          for (const strength of [0, 1])
            forwardLlama(merged(base, knobs.map(({ adapter }) => [adapter, strength])), ids);
          return performance.now() - start;
        }"""
    )
    assert took < 5000  # a tenth of it on a quiet laptop
