"""The pages beside the playground compute what real models, real steps and NumPy say."""

import base64
import json
import math
import re

import nbformat
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

import pages
from conftest import violations
from lora_tasks import DATA, RichBoyNet, byte_count, kept_for_backward
from lora_utils import add_lora, count_parameters

# The memory calculator: formulas

NOTEBOOK_6 = "notebooks/06_what_lora_saves.ipynb"
ROW = r"(.*), batch (\d+)(, 4 bits)? +(.*?) *"  # a line of its table

PARTS = ["weights", "gradients", "optimizer", "activations", "peak"]
SETTINGS = dict(rank=8, targets=["fc1", "fc2", "fc3"], recipe="32 bits", format="as in training")
SETTINGS |= dict(optimizer="Adam", adapters=2, batch=64, tokens=64)
LAYERS = {name: f"{name[0]}_proj" for name in ("query", "key", "value", "output")}
LAYERS |= {name: f"{name}_proj" for name in ("gate", "up", "down")}


def bill(page, model, **settings):
    """What the page's formulas say. A model is a name of the page's list, or a shape."""
    return page.evaluate(
        """([model, settings, kept]) =>
          bill(MODELS[model] ?? model, { ...settings, kept: KEPT[kept] })""",
        [model, SETTINGS | settings, settings.get("kept", 0)],
    )


def kept_bytes(model, run):
    """The bytes that autograd keeps while something runs, the model's own not counted."""
    with kept_for_backward(model) as kept:
        result = run()  # while it lives, so does all that is kept
    del result
    return byte_count(kept)


@pytest.mark.parametrize("targets", [["fc1", "fc2", "fc3"], ["fc3"]])
def test_richboynet_costs_what_pytorch_takes(open_tool, targets):
    page, images, labels = open_tool("memory"), torch.randn(64, 28, 28), torch.arange(64) % 10
    model = RichBoyNet()
    for way in ("full", "lora"):
        if way == "lora":
            add_lora(model, rank=8, alpha=8, targets=targets)
        found = bill(page, "RichBoyNet (notebook 3)", targets=targets)
        loss = lambda: F.cross_entropy(model(images), labels)  # noqa: E731
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained)
        loss().backward()
        optimizer.step()
        states = [t for state in optimizer.state.values() for t in state.values()]
        assert found[way]["weights"] == byte_count(model.parameters())
        assert found[way]["gradients"] == byte_count(p.grad for p in trained)
        assert found[way]["optimizer"] == byte_count(states)
        assert found[way]["activations"] == kept_bytes(model, loss)
    assert (found["total"], found["trained"]) == (2_807_010, count_parameters(model).trainable)


def test_optimizers_remember_what_pytorch_keeps(open_tool):
    page = open_tool("memory")
    for name, momentum in (("SGD", 0), ("SGD with momentum", 0.9)):
        model = RichBoyNet()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=momentum)
        model(torch.randn(2, 1, 28, 28)).sum().backward()
        optimizer.step()
        states = [t for state in optimizer.state.values() for t in state.values()]
        found = bill(page, "RichBoyNet (notebook 3)", optimizer=name)["full"]["optimizer"]
        assert found == byte_count(t for t in states if t is not None), name
    eight = bill(page, "Llama 3.1 8B", targets=["query"], optimizer="Adam, 8 bits", tokens=1)
    assert eight["full"]["optimizer"] / eight["total"] == pytest.approx(2.03, abs=0.01)


def test_four_bits_cost_what_bitsandbytes_takes(open_tool):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    page, weight = open_tool("memory"), torch.randn(1024, 4096)
    for name, rounds in (("4 bits (QLoRA: NF4, scales rounded)", True), ("4.5 bits", False)):
        quantize = bitsandbytes.functional.quantize_4bit
        packed, state = quantize(weight, blocksize=64, compress_statistics=rounds, quant_type="nf4")
        held = [packed, state.absmax] + ([state.state2.absmax, state.offset] if rounds else [])
        [form] = page.evaluate("n => Object.keys(FORMATS).filter((f) => f.startsWith(n))", name)
        ours = page.evaluate("([f, n]) => FORMATS[f](n)", [form, weight.numel()])
        assert ours == byte_count(held), name


def llama(*shape, kind=LlamaConfig, **more):
    names = "vocab_size num_hidden_layers hidden_size num_attention_heads num_key_value_heads"
    return kind(**dict(zip([*names.split(), "intermediate_size"], shape, strict=True)), **more)


TIED = {"tie_word_embeddings": True}
QWEN3 = {"kind": Qwen3Config, "head_dim": 128} | TIED
PUBLISHED = {  # as their configurations have them, and how many numbers that makes
    "SmolLM2 135M": (llama(49152, 30, 576, 9, 3, 1536, **TIED), 134_515_008),
    "Llama 3.2 1B": (llama(128256, 16, 2048, 32, 8, 8192, **TIED), 1_235_814_400),
    "Qwen 3 4B": (llama(151936, 36, 2560, 32, 8, 9728, **QWEN3), 4_022_468_096),
    "Mistral 7B (v0.3)": (llama(32768, 32, 4096, 32, 8, 14336), 7_248_023_552),
    "Qwen 2.5 7B": (llama(152064, 28, 3584, 28, 4, 18944, kind=Qwen2Config), 7_615_616_512),
    "Llama 3.1 8B": (llama(128256, 32, 4096, 32, 8, 14336), 8_030_261_248),
    "Llama 3.1 70B": (llama(128256, 80, 8192, 64, 8, 28672), 70_553_706_496),
    "Llama 2 7B": (llama(32000, 32, 4096, 32, 32, 11008), 6_738_415_616),
    "GPT-2 medium": (GPT2Config(n_embd=1024, n_layer=24, n_head=16), 354_823_168),
}


def test_models_are_counted_as_transformers_builds_them(open_tool):
    page = open_tool("memory")
    for name, (config, published) in PUBLISHED.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tensors = len(list(model.parameters()))
        names = ["query", "value"]
        if name != "GPT-2 medium":
            names = list(LAYERS)
            add_lora(model, rank=16, alpha=16, targets=[LAYERS[n] for n in names])
        found = bill(page, name, rank=16, targets=names)
        assert found["total"] == published, name
        if name != "GPT-2 medium":
            learns = [p for p in model.parameters() if p.requires_grad]
            total, trained = count_parameters(model)
            assert total - trained == published
            assert found["trained"] == trained
            assert found["lora"]["optimizer"] == 8 * found["trained"] + 4 * len(learns)
            assert found["full"]["optimizer"] == 8 * published + 4 * tensors


def test_steps_cost_what_was_measured(open_tool):
    """Kept bytes within 1 %, peaks within 3 %: of real steps on SmolLM2's shape."""
    page, ways = open_tool("memory"), {"query and value": ["query", "value"]}
    shape = page.evaluate("MODELS['SmolLM2 135M']")
    rows = json.loads((DATA / "measured_bytes.json").read_text(encoding="utf-8"))["results"]
    assert {row["precision"] for row in rows} == {"float32", "bfloat16"} and len(rows) == 18
    for row in rows:
        kept = 0 if row["checkpointing"] else {"sdpa": 1, "eager": 2}[row["attention"]]
        found = bill(
            *(page, shape | {"vocabulary": row["vocabulary"]}),
            targets=ways.get(row["way"], list(LAYERS)),
            recipe={"float32": "32 bits", "bfloat16": "16 bits"}[row["precision"]],
            **{"kept": kept, "batch": row["batch"], "tokens": row["tokens"]},
        )["full" if row["way"] == "in full" else "lora"]
        assert found["weights"] == row["weights"], row
        logits = 4 * row["batch"] * row["tokens"] * row["vocabulary"]  # log-softmax is kept
        if not row["checkpointing"]:
            assert found["activations"] == pytest.approx(row["kept"] - logits, rel=0.01), row
        if row["way"] == "in full":  # the sum counts gradients from the start: an upper bound
            assert found["weights"] + found["gradients"] < row["peak"]
            assert row["peak"] < 1.02 * sum(found[part] for part in PARTS), row
        else:
            peak = sum(found[part] for part in PARTS if part != "optimizer")
            assert peak == pytest.approx(row["peak"], rel=0.03), row


def test_notebook_6_gives_the_same_bills(open_tool):
    """Its stored table, to the last digit that it prints; the adapter is 16 bytes a number."""
    page, cells = open_tool("memory"), nbformat.read(pages.ROOT / NOTEBOOK_6, 4).cells
    [table] = (cell.outputs[0].text for cell in cells if cell.id == "fits-run")
    lines = table.splitlines()[1:]
    assert len(lines) == 6
    for line in lines:
        name, batch, bits, *theirs = re.fullmatch(ROW, line).groups()
        stored = "4.5 bits (NF4, scales as they are)" if bits else "as in training"
        found = bill(
            *(page, name),
            **{"rank": 16, "adapters": 4, "targets": list(LAYERS), "recipe": "16 bits"},
            **{"batch": int(batch), "tokens": 2048, "format": stored},
        )
        adapter, ours = 16 * found["trained"], found["lora"]
        ours = [
            *(ours["weights"] - adapter / 4, adapter, ours["activations"], ours["peak"]),
            sum(ours[part] for part in PARTS),
        ]
        assert [f"{size / 1e9:.1f}" for size in ours] == theirs[0].split(), line
    [batches] = (c.outputs[0].text for c in cells if "bits: batch" in str(c.get("outputs")))
    settings = "model=Qwen+3+4B&card=16&tokens=1024"
    for bits, batch in re.findall(r"(\S+) bits: batch (\d+)", batches):  # its first exercise
        stored = "as in training" if bits == "16" else "4.5 bits (NF4, scales as they are)"
        page = open_tool(f"memory#{settings}&rank=4&format={stored}")
        assert f"The largest batch that fits is {batch}." in page.inner_text("#verdict")


def test_pefts_adapters_in_32_bits_keep_their_inputs(open_tool):
    """Over a model in 16 bits: a copy of its input for each adapted layer."""
    from peft import LoraConfig, get_peft_model

    page, shape = open_tool("memory"), {"width": 128, "heads": 4, "head": 32, "groups": 2}
    shape |= {"kind": "Llama", "layers": 2, "mlp": 384, "vocabulary": 64, "tied": True}
    for names in (["query", "value"], list(LAYERS)):
        config = llama(64, 2, 128, 4, 2, 384, **TIED)
        model = AutoModelForCausalLM.from_config(config).bfloat16()
        model = get_peft_model(model, LoraConfig(r=8, target_modules=[LAYERS[n] for n in names]))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        ids = torch.randint(64, (1, 512))
        kept = kept_bytes(model, lambda m=model, i=ids: m(input_ids=i, use_cache=False).logits)
        sizes = {"adapters": 4, "kept": 1, "batch": 1, "tokens": 512}
        found = bill(page, shape, recipe="16 bits", targets=names, **sizes)
        assert found["lora"]["activations"] == pytest.approx(kept, rel=0.04), names


class GPTBlock(nn.Module):
    """A block with biases and norms of two vectors, as the page counts a GPT."""

    def __init__(self, width, heads, fused):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        for name in ("query", "key", "value", "output"):
            setattr(self, name, nn.Linear(width, width))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        normed = self.norm1(x)
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(normed).unflatten(1, (self.heads, -1)).transpose(0, 1) for layer in layers)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        else:
            scores = (q / q.shape[-1] ** 0.5) @ k.transpose(1, 2)
            hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
            mixed = scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1) @ v
        x = x + self.output(mixed.transpose(0, 1).flatten(1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@pytest.mark.parametrize("fused", [True, False])
def test_a_gpt_keeps_what_autograd_keeps(open_tool, fused):
    page, tokens = open_tool("memory"), 200
    shape = {"kind": "GPT", "layers": 1, "width": 128, "heads": 4, "head": 32, "groups": 4}
    shape |= {"mlp": 512, "vocabulary": 1}
    for names in (["query", "value"], ["up", "down"], ["query", "key", "value", "output"], None):
        block = GPTBlock(128, 4, fused)
        if names:
            add_lora(block, rank=8, alpha=8, targets=names)
        x = torch.randn(tokens, 128, requires_grad=True)
        found = bill(
            *(page, shape), targets=names or ["query"], tokens=tokens, batch=1, kept=2 - fused
        )["lora" if names else "full"]
        # A stored matrix is masked: the mask counts a byte, and queries are kept scaled, too.
        extra = 0 if fused else tokens * tokens
        kept = kept_bytes(block, lambda b=block, x=x: b(x)) - extra
        assert found["activations"] == pytest.approx(kept, rel=0.002), names


# The memory calculator: the page


def test_the_calculator_answers_for_a_card(open_tool):
    page = open_tool("memory")
    assert "Yes, LoRA fits." in page.inner_text("#verdict")
    assert "takes 132 GB, 16 bytes of it for each weight" in page.inner_text("#in-full")
    assert "usable: 21.6 of 24 GB" in page.inner_text("#key")  # beside the line's sign
    page.locator("#batch").fill("4")
    said = page.inner_text("#verdict")
    assert "No, LoRA does not fit." in said
    assert "It takes 31.2 GB; usable: 21.6 of 24 GB." in said and "needs a card of 40 GB" in said
    assert "With frozen weights in 4 bits (QLoRA) it takes 20.8 GB and fits." in said
    page.locator("#batch").fill("1")
    page.locator("#kept").select_option("all, with fused attention")
    assert "With checkpointing it takes 20.1 GB and fits." in page.inner_text("#verdict")
    page.locator("#kept").select_option("one tensor a block (checkpointing)")
    page.locator("#format").select_option("4 bits (QLoRA: NF4, scales rounded)")
    most = int(re.search(r"largest batch that fits is (\d+)", page.inner_text("#verdict"))[1])
    for batch, answer in ((most, "Yes, QLoRA fits."), (most + 1, "No, QLoRA does not fit.")):
        page.locator("#batch").fill(str(batch))
        assert answer in page.inner_text("#verdict")
    page.locator("#model").select_option("RichBoyNet (notebook 3)")
    page.locator("#recipe").select_option("32 bits")
    page.locator("#rank").focus()
    page.keyboard.press("End")
    assert "r = 8" in page.inner_text("#bars")  # fc3 has ten outputs, so no rank of 16


def test_own_numbers_say_what_is_wrong_and_stay_in_the_address(open_tool):
    page = open_tool("memory")
    page.locator("#model").select_option("SmolLM2 135M")
    page.get_by_text("The model’s shape").click()
    before = page.inner_text("#table")
    page.locator("#layers").fill("1.5")
    assert "“Blocks” must be a whole number" in page.inner_text("#message")
    assert page.inner_text("#table") == before
    page.locator("#layers").fill("31")
    assert page.locator("#model").input_value() == "Your own numbers"
    page.locator("#tied").uncheck()
    own = page.inner_text("#says")
    assert page.inner_text("#message") == "" and f"{134_515_008 + 3_540_096 + 49152 * 576:,}" in own
    again = open_tool(f"memory#{page.evaluate('location.hash.slice(1)')}")
    assert again.inner_text("#says") == own
    assert again.inner_text("#bars") == page.inner_text("#bars")
    odd = open_tool("memory#model=Nothing&batch=x&targets=none&rank=99")
    assert "fits" in odd.inner_text("#verdict") or odd.inner_text("#message")


def test_on_a_phone_the_answer_stays_while_a_control_changes(open_tool):
    page = open_tool("memory", width=390, height=664)
    assert page.locator("#verdict").bounding_box()["y"] < 400
    sizes = "all => all.map((e) => parseFloat(getComputedStyle(e).fontSize))"
    assert (
        min(page.locator("select, input[type=number]").evaluate_all(sizes)) >= 16
    )  # else it zooms
    page.locator("#optimizer").select_option("SGD")
    page.locator("#optimizer").scroll_into_view_if_needed()
    box = page.locator("#verdict").bounding_box()
    assert page.evaluate("scrollY") > 200 and 0 <= box["y"] < 300
    page.locator("#format").select_option("4 bits (QLoRA: NF4, scales rounded)")
    assert page.locator("thead th").all_inner_texts() == ["in full", "QLoRA"]
    for cell in page.locator("#table td").all():  # a gap, and no number is broken from its unit
        look = "c => [parseFloat(getComputedStyle(c).paddingLeft), getComputedStyle(c).whiteSpace]"
        assert cell.evaluate(look) == [12, "nowrap"]


# The photograph

TEXT = """(numbers) => {
  const bytes = new Uint8Array(numbers.buffer);
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192)
    text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}"""
SUM = f"(rank) => ({TEXT})(Float32Array.from(sumTo(rank)))"
GREY = f"""() => {{
  const pen = document.getElementById("picture").getContext("2d");
  const {{ data }} = pen.getImageData(0, 0, 512, 600);
  return ({TEXT})(Uint8Array.from({{ length: 512 * 600 }}, (_, i) => data[4 * i + 1]));
}}"""


@pytest.fixture(scope="module")
def photo():
    return pages.photograph().astype(float)


@pytest.fixture(scope="module")
def truncated(photo):
    """NumPy's truncation of the photograph to a rank, as a function."""
    U, S, Vh = np.linalg.svd(photo, full_matrices=False)
    return lambda rank: (U[:, :rank] * S[:rank]) @ Vh[:rank]


def test_the_picture_is_numpys_truncation(open_tool, photo, truncated):
    """At each rank within one step of grey of 255, going up or down."""
    page = open_tool("rank")
    for rank in (1, 5, 64, 20, 200, 512, 50):
        ours = base64.b64decode(page.evaluate(SUM, rank))
        ours = np.frombuffer(ours, dtype=np.float32).reshape(photo.shape)
        theirs = truncated(rank)
        assert np.abs(ours - theirs).max() < 1, rank
        measured, predicted = page.evaluate("r => errors(r)", rank)
        expected = np.linalg.norm(photo - theirs) / np.linalg.norm(photo)
        assert predicted == pytest.approx(expected, abs=1e-6)
        assert measured == pytest.approx(expected, abs=2e-3)


def test_the_slider_shows_numbers_and_errors(open_tool, photo, truncated):
    page = open_tool("rank")
    for rank in (1, 5, 20, 50):
        page.get_by_role("button", name=f"rank {rank}", exact=True).click()
        assert f"{rank * 1112:,}" in page.inner_text("#table")
        error = np.linalg.norm(photo - truncated(rank)) / np.linalg.norm(photo)
        assert f"keep {100 * (1 - error**2):.1f} %" in page.inner_text("#says")
        assert page.inner_text("#table").count(f"{100 * error:.1f} %") == 2  # and Eckart–Young's
    shown = page.evaluate(GREY)  # of the canvas: whole steps, from 0 to 255
    shown = np.frombuffer(base64.b64decode(shown), dtype=np.uint8).reshape(photo.shape)
    assert np.abs(shown - truncated(50).clip(0, 255)).max() < 1.6
    look = page.evaluate("getComputedStyle(document.querySelector('#curve path'))")
    assert look["fill"] == "none" != look["stroke"]  # a line, not an area
    box = open_tool("rank", 390, 664).locator("#rank").bounding_box()
    assert box["y"] + box["height"] <= 664  # on a phone: picture and slider on one screen
    slider = page.get_by_role("slider", name="rank")
    slider.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.getElementById('shown').textContent === '2'")
    page.keyboard.press("End")
    page.wait_for_function("document.getElementById('shown').textContent === '512'")
    assert "do not pay" in page.inner_text("#says")
    assert slider.get_attribute("aria-valuetext") == "rank 512"
    assert f"beyond rank {math.floor(600 * 512 / (600 + 512))}" in page.inner_text("#says")


# All four


def make_busy(page, name):
    """Let a page show all that it can show."""
    if name == "memory":
        page.get_by_text("The model’s shape").click()
        page.locator("#layers").fill("0")
        assert page.inner_text("#message")
    elif name == "playground":
        page.evaluate("turnAll({rotated: 1, nines: -0.5})")
        page.locator("#curve .here").wait_for(state="attached")
        assert not page.evaluate("""[...$("curve").querySelectorAll("text")].some((text) => {
          const { x, width } = text.getBBox();
          return x < 0 || x + width > $("curve").viewBox.baseVal.width;
        })""")
        page.evaluate("tell('what is wrong', true)")
    elif name == "language":
        for kind in ("gain", "harder"):
            page.locator(f"#tokens .{kind}").first.wait_for()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["language", "playground", "memory", "rank"])
def test_tools_are_accessible_and_fit(open_tool, name, width, theme):
    page = open_tool(name, width, 844, color_scheme=theme)
    make_busy(page, name)
    assert page.get_attribute("html", "data-theme") == theme
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert violations(page) == []
