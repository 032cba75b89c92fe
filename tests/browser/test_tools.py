"""The pages beside the playground compute what the notebooks and NumPy compute."""

import base64
import contextlib
import io
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import pages
from conftest import open_page, violations
from lora_tasks import RichBoyNet, load_mnist
from lora_utils import add_lora, count_parameters

PAGES = ["memory", "rank"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with both pages, as the site has them."""
    folder = tmp_path_factory.mktemp("tools")
    pages.write_tools(folder)
    return folder


@pytest.fixture
def open_tool(browser, written):
    """Open a page by its name, in a window of some width and theme."""
    with contextlib.ExitStack() as stack:

        def open_tool(name, width=1280, theme="light"):
            look = {"viewport": {"width": width, "height": 900}, "color_scheme": theme}
            page = stack.enter_context(open_page(browser, written.as_uri(), **look))
            page.goto((written / f"{name}.html").as_uri())
            return page

        yield open_tool


# The memory calculator


def sources(name):
    """The cells of a notebook: source and what is stored below it, by id."""
    [path] = pages.NOTEBOOKS.glob(f"{name}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return {
        cell["id"]: (
            "".join(cell["source"]),
            "".join("".join(output.get("text", "")) for output in cell.get("outputs", [])),
        )
        for cell in cells
    }


@pytest.fixture(scope="module")
def six():
    """What notebook 6 defines, after its own cells have run."""
    cells, names = sources("06"), {}
    names["train"] = load_mnist(torch.device("cpu"))[0]
    names["device"] = torch.device("cpu")
    run = ["imports", "imports-lora", "build", "kept", "kept-run", "memory-measured"]
    run += ["bits-mixed", "block", "block-bytes", "whole-code", "whole-table", "gpt3-bytes"]
    with contextlib.redirect_stdout(io.StringIO()):
        for name in run:
            source = cells[name][0].replace("set_plot_style()\ndevice = pick_device()", "")
            exec(source, names)
        exec(cells["longer"][0].split("\n\n")[0], names)  # FusedBlock
    return names


SETTINGS = {
    "rank": 8,
    "targets": ["fc1", "fc2", "fc3"],
    "recipe": "float32",
    "format": "as in training",
    "optimizer": "Adam",
    "batch": 64,
    "tokens": 64,
}


def bill(page, model, **settings):
    """What the page's formulas say. A model is a name of the page's list, or a shape."""
    kept = {"kept": page.evaluate("KEPT[0]")}
    return page.evaluate(
        "([model, settings]) => bill(MODELS[model] ?? model, settings)",
        [model, SETTINGS | kept | settings],
    )


def test_richboynet_costs_what_notebook_6_measures(open_tool, six):
    page = open_tool("memory")
    for rank in (1, 8):
        six["RANK"] = rank
        found = bill(page, "RichBoyNet (notebook 3)", rank=rank)
        assert found["full"] == six["measured_bytes"]("full fine-tuning")
        assert found["lora"] == six["measured_bytes"]("branch")
        mixed = bill(page, "RichBoyNet (notebook 3)", rank=rank, recipe="mixed precision")
        for form, way in (("full fine-tuning", "full"), ("branch", "lora")):
            parts = six["mixed_precision_bytes"](form)
            network, images = six["build"](form).bfloat16(), six["images"].bfloat16()
            loss = lambda logits: six["classification_loss"](logits.float())  # noqa: E731
            with six["kept_for_backward"](network) as kept:
                loss(network(images))
            assert mixed[way] == parts | {"activations": six["byte_count"](kept)}
    small = RichBoyNet()
    add_lora(small, rank=8, alpha=8, targets=["fc3"])
    with six["kept_for_backward"](small) as kept:
        six["classification_loss"](small(six["images"]))
    found = bill(page, "RichBoyNet (notebook 3)", targets=["fc3"])
    assert found["lora"]["activations"] == six["byte_count"](kept)
    assert found["trained"] == count_parameters(small).trainable


def test_optimizers_remember_what_pytorch_keeps(open_tool):
    page = open_tool("memory")
    makers = {
        "Adam": torch.optim.Adam,
        "SGD": torch.optim.SGD,
        "SGD with momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    }
    for name, maker in makers.items():
        model = RichBoyNet()
        optimizer = maker(model.parameters(), lr=1e-3)
        model(torch.randn(2, 1, 28, 28)).sum().backward()
        optimizer.step()
        held = [t for state in optimizer.state.values() for t in state.values() if t is not None]
        found = bill(page, "RichBoyNet (notebook 3)", optimizer=name)["full"]["optimizer"]
        assert found == sum(t.numel() * t.element_size() for t in held), name


def test_four_bits_cost_what_notebook_8_measures(open_tool):
    page, cells, names = open_tool("memory"), sources("08"), {}
    measured = re.search(r"4 bits, lean +[\d,]+ +([\d,]+)", cells["bill-table"][1])[1]
    lean = bill(page, "RichBoyNet (notebook 3)", format="4.5 bits (4, and scales)")["lora"]
    assert f"{sum(lean.values()):,}" == measured
    rounded = "4.127 bits (scales rounded, too)"
    per_weight = page.evaluate("name => 8 * FORMATS[name](784 * 1000) / (784 * 1000)", rounded)
    assert f"{per_weight:.3f}" in cells["double"][1].split("measured")[1]
    with contextlib.redirect_stdout(io.StringIO()):
        exec(cells["save-run"][0], names)
    everywhere = page.evaluate("TARGETS['all linear layers']")
    for ours, theirs in (("Llama 2, 7 billion", "LLaMA 7B"), ("GPT-3", "GPT-3")):
        settings = {"rank": 16, "targets": everywhere, "recipe": "mixed precision"}
        ways = {
            "full": bill(page, ours, **settings)["full"],
            "LoRA": bill(page, ours, **settings)["lora"],
            "4 bits": bill(page, ours, **settings, format=rounded)["lora"],
        }
        for way, parts in ways.items():
            total = sum(parts.values()) - parts["activations"]
            assert total / 1e9 == pytest.approx(names["gigabytes"][theirs][way], rel=1e-3)


def test_gpt3_costs_what_notebook_6_says(open_tool, six):
    page = open_tool("memory")
    factors = 2 * 2 * 96  # tensors: A and B, of query and value, in each block
    tensors = len(list(six["gpt3"].parameters())) - factors
    formats = page.evaluate("Object.keys(FORMATS)")
    rows = {
        "full, float32": ("full", "float32", formats[0], tensors),
        "full, mixed": ("full", "mixed precision", formats[0], tensors),
        "LoRA, float32": ("lora", "float32", formats[0], factors),
        "LoRA, mixed": ("lora", "mixed precision", formats[0], factors),
        "LoRA, 4 bits": ("lora", "mixed precision", formats[3], factors),
    }
    for name, (way, recipe, stored, count) in rows.items():
        targets = ["query", "value"]
        found = bill(page, "GPT-3", rank=4, targets=targets, recipe=recipe, format=stored)
        assert (found["total"], found["trained"]) == (six["gpt3_weights"], six["gpt3_trained"])
        expected = dict(six["gpt3_bytes"][name])
        expected["optimizer"] += 4 * count  # the steps that Adam counts
        assert found[way] == expected | {"activations": found[way]["activations"]}, name
        checkpoints = 64 * 96 * 64 * 12288  # one tensor for each text and block
        assert found[way]["activations"] == (4 if recipe == "float32" else 2) * checkpoints


PUBLISHED = {  # shapes, as their configurations have them
    "Llama 2, 7 billion": {},
    "Llama 2, 70 billion": {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
    },
    "The small Llama of notebook 7": None,
}
NAMES = {
    "query and value": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "the MLP": ["gate_proj", "up_proj", "down_proj"],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_llamas_are_counted_as_transformers_builds_them(open_tool, name):
    page, settings = open_tool("memory"), PUBLISHED[name]
    config = (
        LlamaConfig.from_pretrained(pages.ROOT / "data" / "language_model")
        if settings is None
        else None
    )
    for group, targets in NAMES.items():
        with torch.device("meta"):
            model = LlamaForCausalLM(config or LlamaConfig(**settings))
        tensors, total = len(list(model.parameters())), count_parameters(model).total
        add_lora(model, rank=16, alpha=16, targets=targets)
        learns = [p for p in model.parameters() if p.requires_grad]
        found = bill(page, name, rank=16, targets=page.evaluate(f"TARGETS['{group}']"))
        assert found["total"] == total
        assert found["trained"] == sum(p.numel() for p in learns)
        assert found["full"]["optimizer"] == 8 * total + 4 * tensors
        assert found["lora"]["optimizer"] == 8 * found["trained"] + 4 * len(learns)


def llama_block(six, fused):
    """A block of notebook 6 with the norms and the MLP of Llama."""

    class LlamaBlock(six["FusedBlock" if fused else "Block"]):
        def __init__(self, width, heads):
            super().__init__(width, heads)
            self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
            del self.feed_in, self.feed_out
            self.gate, self.up = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
            self.down = nn.Linear(3 * width, width)

        def forward(self, x):
            normed = self.norm1(x)
            q, k, v = (self.split(layer(normed)) for layer in (self.query, self.key, self.value))
            x = x + self.output(self.attention(q, k, v).transpose(0, 1).flatten(1))
            normed = self.norm2(x)
            return x + self.down(F.silu(self.gate(normed)) * self.up(normed))

    return LlamaBlock


@pytest.mark.parametrize("kind", ["GPT", "Llama"])
@pytest.mark.parametrize("fused", [False, True])
def test_activations_are_those_that_autograd_keeps(open_tool, six, kind, fused):
    page = open_tool("memory")
    block = llama_block(six, fused) if kind == "Llama" else six["FusedBlock" if fused else "Block"]
    theirs = {"up": "feed_in", "down": "feed_out"} if kind == "GPT" else {}
    shape = {"kind": kind, "layers": 1, "width": 128, "heads": 4, "keys": 128, "vocabulary": 1}
    shape["mlp"] = (4 if kind == "GPT" else 3) * 128
    kept = page.evaluate(f"KEPT[{1 if fused else 2}]")
    six["RANK"] = 8
    for tokens in (64, 200):
        for group in page.evaluate("Object.values(TARGETS)"):
            targets = [name for name in group if kind == "Llama" or name != "gate"]
            found = bill(page, shape, targets=targets, tokens=tokens, batch=1, kept=kept)
            names = [theirs.get(name, name) for name in targets]
            assert found["lora"]["activations"] == six["block_bytes"](block, tokens, names), group
        assert found["full"]["activations"] == six["block_bytes"](block, tokens, [])


def test_the_calculator_shows_its_bill(open_tool):
    page = open_tool("memory")
    assert "45.9 MB" in page.inner_text("#bars") and "13.1 MB" in page.inner_text("#bars")
    page.get_by_label("Rank").focus()
    page.keyboard.press("ArrowLeft")
    assert "r = 4" in page.inner_text("#bars")
    page.keyboard.press("End")
    assert "r = 8" in page.inner_text("#bars")  # fc3 has ten outputs, so no rank of 16
    page.get_by_label("Model").select_option("Llama 2, 7 billion")
    page.get_by_label("LoRA on").select_option("all linear layers")
    page.get_by_label("Training in").select_option("mixed precision")
    page.get_by_label("Frozen weights in").select_option("4.127 bits (scales rounded, too)")
    assert "6,738,415,616" in page.inner_text("#says")
    assert "takes more than 80 GB, LoRA fits into 24 GB" in page.inner_text("#says")
    before = page.inner_text("#table")
    page.get_by_label("Blocks").fill("16")
    assert page.inner_text("#table") != before
    assert page.get_by_label("Model").input_value() == "Your own numbers"
    before = page.inner_text("#table")
    page.get_by_label("Blocks").fill("1.5")
    assert "“blocks” must be a whole number" in page.inner_text("#message")
    assert page.inner_text("#table") == before
    page.get_by_label("Blocks").fill("32")
    assert page.inner_text("#message") == "" and "6,738,415,616" in page.inner_text("#says")


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
    stored = sources("01")["photo-energy"][1]
    for rank in (1, 5, 20, 50):
        page.get_by_role("button", name=f"rank {rank}", exact=True).click()
        expected = re.search(rf"rank +{rank}: +([\d,]+) of ([\d,]+) numbers, ([\d.]+)%", stored)
        assert expected[1] in page.inner_text("#table") and expected[2] in page.inner_text("#table")
        assert f"keep {expected[3]} %" in page.inner_text("#says")
        error = np.linalg.norm(photo - truncated(rank)) / np.linalg.norm(photo)
        assert page.inner_text("#table").count(f"{100 * error:.1f} %") == 2  # and Eckart–Young's
    shown = page.evaluate(GREY)  # of the canvas: whole steps, from 0 to 255
    shown = np.frombuffer(base64.b64decode(shown), dtype=np.uint8).reshape(photo.shape)
    assert np.abs(shown - truncated(50).clip(0, 255)).max() < 1.6
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


# Both


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_tools_are_accessible_and_fit(open_tool, name, width, theme):
    page = open_tool(name, width, theme)
    if name == "memory":
        page.get_by_label("Model").select_option("Llama 2, 7 billion")
        page.get_by_label("Blocks").fill("0")
        assert page.inner_text("#message")
    assert page.get_attribute("html", "data-theme") == theme
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert violations(page) == []


def test_the_pages_hold_all_that_they_need(written):
    for name in PAGES:
        text = (written / f"{name}.html").read_text(encoding="utf-8")
        assert "/* " not in re.findall(r"<style>\s*(.{20})", text, re.S)[0]
        assert not re.search(r"/\* \w+\.(css|js) \*/|<!-- stored -->", text)
