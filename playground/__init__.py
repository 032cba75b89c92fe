"""The playground: one web page that holds RichBoyNet, its adapters and some digits, and runs them.

The page needs no server, no kernel and no other file. What it computes stands in `network.js`,
what it shows in `page.html`, `page.css` and `page.js`; this module puts them together
(notebook 4).
"""

import base64
import copy
import json
import math
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from html import escape
from pathlib import Path
from urllib.parse import quote

import safetensors.torch
import torch
import torch.nn as nn
from IPython.display import HTML

from lora_tasks import Digits
from lora_utils import CONFIG_FILE, WEIGHTS_FILE, load_adapter, lora_layers

SOURCES = Path(__file__).resolve().parent
PIECES = 40


def write_playground(
    path: str | Path,
    base: nn.Module,
    adapters: dict[str, Path],
    digits: Digits,
    pixel_order: torch.Tensor,
) -> None:
    """Write the page: one HTML file of about 4.5 MB.

    Args:
        path: the file to write.
        base: a RichBoyNet without LoRA.
        adapters: by name, the folders that `save_adapter` or PEFT wrote.
        digits: test digits; the page keeps some sixty of them.
        pixel_order: the order of the 784 pixels in a scrambled image.
    """
    Path(path).write_text(page(pack(base, adapters, digits, pixel_order)), encoding="utf-8")


def show_playground(path: str | Path, height: int = 1000) -> HTML:
    """Show the page below a cell.

    Jupyter serves the file, so the output is only a link to it. Colab and VS Code do not: there
    the output holds the whole page.
    """
    if "google.colab" in sys.modules or "VSCODE_PID" in os.environ:
        source = f'srcdoc="{escape(Path(path).read_text(encoding="utf-8"))}"'
    else:
        source = f'src="{escape(str(path))}"'
    look = f'width="100%" height="{height}" loading="lazy" style="border: 0"'
    return HTML(f'<div><iframe {source} title="LoRA playground" {look}></iframe></div>')


def page(stored: bytes) -> str:
    """Return the page that holds what `pack` returned.

    The numbers come last and in pieces, each followed by word of its arrival, so that a page that
    loads slowly already plays: the answers for its first digit stand before them.
    """
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    text = inline("page.html").replace("<!-- opening -->", header["__metadata__"]["opening"])
    numbers = base64.b64encode(stored).decode()
    size = 4 * math.ceil(len(numbers) / 4 / PIECES)
    pieces = []
    for i in range(PIECES):
        piece = numbers[i * size : (i + 1) * size]
        pieces.append(f'<script type="application/octet-stream" class="stored">{piece}</script>')
        pieces.append(f"<script>arrived({(i + 1) / PIECES})</script>")
    return text.replace("<!-- stored -->", "\n".join(pieces))


def inline(name: str) -> str:
    """Return a page of this folder with the files in it that it names: /* page.css */."""

    def content(found: re.Match) -> str:
        if found[1].endswith(".js"):
            return '"use strict";\n' + script(found[1], set())
        return (SOURCES / found[1]).read_text(encoding="utf-8")

    text = (SOURCES / name).read_text(encoding="utf-8")
    picture = quote((SOURCES / "icon.svg").read_text(encoding="utf-8").strip())
    icon = f'<link rel="icon" href="data:image/svg+xml,{picture}">'
    text = text.replace("<!-- icon -->", icon)
    return re.sub(r"/\* (\w+\.(?:css|js)) \*/", content, text)


def script(name: str, read: set[str]) -> str:
    """Return a module without its imports and exports, after all that it imports, each once.

    A page that is opened as a file may not load modules, so it holds one long script.
    """
    read.add(name)
    text = (SOURCES / name).read_text(encoding="utf-8")
    imported = re.findall(r'^import .*?"\./(\w+\.js)";$', text, flags=re.M | re.S)
    before = "".join(script(other, read) for other in imported if other not in read)
    text = re.sub(r'^import .*?";\n', "", text, flags=re.M | re.S)
    return before + re.sub(r"^export ", "", text, flags=re.M)


def pack(
    base: nn.Module, adapters: dict[str, Path], digits: Digits, pixel_order: torch.Tensor
) -> bytes:
    """Return all that the page needs as one file in the safetensors format.

    Its tensors are "base/…", "digits/…" and "NAME/…" for each adapter; its metadata hold the
    settings of the adapters, the examples and the opening. The arguments are those of
    `write_playground`.
    """
    with torch.no_grad():
        kept, examples = choose_digits(dequantised(base), adapters, digits, pixel_order)
        begin = opening(dequantised(base), adapters, digits)
    tensors = {f"base/{name}": tensor for name, tensor in quantise(base).items()}
    tensors["digits/images"] = pixels_of(digits.images[kept])
    tensors["digits/labels"] = digits.labels[kept].cpu().to(torch.uint8)
    tensors["digits/pixel_order"] = pixel_order.cpu().to(torch.int16)
    settings = {}
    for name, folder in adapters.items():
        settings[name] = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
        for key, tensor in safetensors.torch.load_file(Path(folder) / WEIGHTS_FILE).items():
            tensors[f"{name}/{key}"] = tensor
    metadata = {"adapters": json.dumps(settings), "examples": json.dumps(examples)}
    metadata["opening"] = json.dumps(begin)
    return safetensors.torch.save(tensors, metadata)


def quantise(base: nn.Module) -> dict[str, torch.Tensor]:
    """Return the base's numbers, the weights as int8 with one scale for each row."""
    tensors = {}
    for name, tensor in base.state_dict().items():
        tensor = tensor.detach().cpu().float()
        if tensor.ndim == 2:
            scale = tensor.abs().amax(dim=1).clamp(min=1e-12) / 127
            tensors[f"{name}_scale"] = scale
            tensor = (tensor / scale[:, None]).round().to(torch.int8)
        tensors[name] = tensor
    return tensors


def dequantised(base: nn.Module) -> nn.Module:
    """Return a copy of the base with the weights that the page has: rounded to int8 and back."""
    tensors = quantise(base)
    for name in [name for name in tensors if name.endswith("_scale")]:
        weight = name.removesuffix("_scale")
        tensors[weight] = tensors[weight] * tensors.pop(name)[:, None]
    copied = copy.deepcopy(base)
    copied.load_state_dict(tensors)
    return copied


def choose_digits(
    base: nn.Module, adapters: dict[str, Path], digits: Digits, pixel_order: torch.Tensor
) -> tuple[list[int], dict[str, dict]]:
    """Return which digits the page keeps, and the examples that it offers.

    Of each digit four are kept that the base reads and two that it misreads. An example is
    searched for among 1,000 digits: the answers must be those that its text in `page.html`
    promises. One that is not found, or whose adapter is not there, is left out.
    """
    images, labels = digits.images[:1000], digits.labels[:1000]
    arrive = {
        "upright": images,
        "rotated": images.rot90(-1, dims=(1, 2)),
        "scrambled": images.flatten(1)[:, pixel_order].view(-1, 28, 28),
    }

    @cache
    def says(arrival: str, **strengths: float) -> torch.Tensor:
        """What is answered if the digits arrive so and the knobs stand so?"""
        model = with_adapters(base, {adapters[name]: s for name, s in strengths.items()})
        return model(arrive[arrival]).argmax(dim=1)

    def reads(arrival: str, **strengths: float) -> torch.Tensor:
        return says(arrival, **strengths) == labels

    # By name: how the digit arrives, where the knobs stand, which to turn, how far; which digits.
    wanted: dict[str, tuple[str, dict, str, float, Callable[[], torch.Tensor]]] = {
        "nines": (
            *("upright", {}, "nines", 1),
            lambda: ~reads("upright") & reads("upright", nines=1) & (labels == 9),
        ),
        "price": (
            *("upright", {}, "nines", 1),
            lambda: reads("upright") & (labels != 9) & (says("upright", nines=1) == 9),
        ),
        "rotated": (
            *("rotated", {}, "rotated", 1),
            lambda: ~reads("rotated") & reads("rotated", rotated=1),
        ),
        "half": (
            *("upright", {"rotated": 1}, "rotated", 0.5),
            lambda: (
                ~reads("upright", rotated=1)
                & reads("upright", rotated=0.5)
                & reads("rotated", rotated=0.5)
                & ~reads("rotated")
            ),
        ),
        "scrambled": (
            *("scrambled", {}, "scrambled", 1),
            lambda: ~reads("scrambled") & reads("scrambled", scrambled=1),
        ),
        "european": (
            *("upright", {}, "european", 1),
            lambda: ~reads("upright") & reads("upright", european=1) & (labels == 1),
        ),
        "both": (
            *("rotated", {"rotated": 1}, "scrambled", 1),
            lambda: reads("rotated", rotated=1) & ~reads("rotated", rotated=1, scrambled=1),
        ),
        "beyond": (
            *("rotated", {"rotated": 1}, "rotated", 2),
            lambda: reads("rotated", rotated=1) & ~reads("rotated", rotated=2),
        ),
    }
    kept, right = [], reads("upright")
    for label in range(10):
        for mask, count in ((right, 4), (~right, 2)):
            kept += torch.where(mask & (labels == label))[0][:count].tolist()
    examples = {}
    for name, (arrival, strengths, knob, target, which) in wanted.items():
        if {knob, *strengths} <= adapters.keys():
            found = [index for index in torch.where(which())[0].tolist() if index not in kept]
            if found:
                examples[name] = {"digit": len(kept), "arrival": arrival, "knob": knob}
                examples[name] |= {"strengths": strengths, "target": target}
                kept.append(found[0])
    return kept, examples


def opening(base: nn.Module, adapters: dict[str, Path], digits: Digits) -> dict | None:
    """Return the digit with which the page begins, and its answers at each strength of one knob.

    It lies on its side, and the adapter "rotated" is sure of it from 0.5 on. Of some such digits
    take the one that the base is most sure to misread.
    """
    if "rotated" not in adapters:
        return None
    lying, labels = digits.images[:300].rot90(-1, dims=(1, 2)), digits.labels[:300, None]

    def answers(images: torch.Tensor, strength: float) -> torch.Tensor:
        return with_adapters(base, {adapters["rotated"]: strength})(images).softmax(dim=1)

    adapted = torch.stack([answers(lying, s) for s in (0.5, 0.75, 1, 1.25)])
    sure = adapted.amin(dim=0).gather(1, labels)[:, 0] > 0.9
    alone = answers(lying, 0)
    misread = (alone.argmax(dim=1) != labels[:, 0]) & sure
    if not misread.any():
        return None
    best = int((alone.amax(dim=1) * misread).argmax())
    table = [answers(lying[best : best + 1], i / 20 - 1)[0].tolist() for i in range(61)]
    return {
        "digit": int(labels[best]),
        "pixels": base64.b64encode(pixels_of(lying[best]).numpy().tobytes()).decode(),
        "knob": "rotated",
        "knobs": ["rotated", *(name for name in adapters if name != "rotated")],
        "answers": [[round(p, 4) for p in row] for row in table],
    }


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    """Return the pixels as they were before `load_mnist`: whole numbers from 0 to 255."""
    return ((images.cpu() * 0.3081 + 0.1307) * 255).round().to(torch.uint8)


def with_adapters(base: nn.Module, strengths: dict[Path, float]) -> nn.Module:
    """Return a copy of the base with Σ strength·ΔW added, over the adapters in these folders."""
    summed = copy.deepcopy(base)
    for folder, strength in strengths.items():
        adapted = copy.deepcopy(base)
        load_adapter(adapted, folder)
        for name, layer in lora_layers(adapted).items():
            weight = summed.get_submodule(name).weight
            weight.data += strength * layer.delta_W()
    return summed
