"""Weights in a few bits, as notebook 9 teaches it: codes, blocks, packing, quantised layers."""

import hashlib
import math
from collections.abc import Callable, Iterable
from functools import cache
from statistics import NormalDist

import torch
import torch.nn as nn
import torch.nn.functional as F

from lora_utils import LoRALinear

# --- Codes: which values the numbers stand for --------------------------------------------------

NF4 = torch.tensor(  # as QLoRA's authors published it (appendix E), so that every bit is theirs
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
    + [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
    + [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)

FP4 = torch.tensor([0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])  # bitsandbytes' default
FP4 = torch.cat([-FP4.flip(0)[:-1], FP4])  # floating point: its zero has two numbers, so fifteen


def normal_float(bits: int) -> torch.Tensor:
    """Return the 2^bits values of NormalFloat: quantiles of a normal distribution, from -1 to 1."""
    half = 2 ** (bits - 1)
    tail = (1 / (4 * half - 2) + 1 / (4 * half)) / 2  # beyond the last value, as in bitsandbytes
    quantile = NormalDist().inv_cdf
    above = [quantile(0.5 + (0.5 - tail) * i / half) for i in range(1, half + 1)]
    below = [quantile(0.5 - (0.5 - tail) * i / (half - 1)) for i in range(1, half)]
    return torch.tensor(sorted([*below, 0.0, *above])) / max(above)


@cache
def error_density() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a grid of u, and c(u) times its step, for normal weights in blocks of 64."""
    u = torch.linspace(-1, 1, 8001, dtype=torch.float64)
    m = torch.linspace(0.5, 6.5, 400, dtype=torch.float64)[:, None]
    normal = torch.distributions.Normal(0, 1)

    def density(z: torch.Tensor) -> torch.Tensor:
        return normal.log_prob(z).exp()

    inside = torch.erf(m / math.sqrt(2))  # the chance to lie between -m and m
    largest = 64 * 2 * density(m) * inside**63 * (m[1] - m[0])  # the chance that m is the largest
    others = largest * 63 / 64 * m**3 * density(m * u) / inside
    counts = others.sum(dim=0) * (u[1] - u[0])
    counts[[0, -1]] += (largest * m**2).sum() / 128  # the largest itself lies at -1 or at 1
    return u, counts


def predicted_error(code: torch.Tensor) -> float:
    """Return the mean squared error of a code on normal weights of variance 1."""
    u, counts = error_density()
    nearest = torch.bucketize(u, (code[1:] + code[:-1]).double() / 2)
    return (counts * (u - code.double()[nearest]) ** 2).sum().item()


def lloyd_max(code: torch.Tensor) -> torch.Tensor:
    """Move each value to the mean of what it stands for, again and again."""
    u, counts = error_density()
    for _ in range(300):
        nearest = torch.bucketize(u, (code[1:] + code[:-1]).double() / 2)
        code = torch.bincount(nearest, counts * u) / torch.bincount(nearest, counts)
    return code.float()


# --- Weights as numbers -------------------------------------------------------------------------


def in_blocks(weight: torch.Tensor, block: int = 64) -> torch.Tensor:
    """Return the weights in rows of one block each, the last one filled with zeros.

    Raises:
        ValueError: they are not all finite floating-point numbers.
    """
    flat = weight.detach().flatten().float()  # 16-bit arithmetic would choose other numbers
    if not (weight.is_floating_point() and flat.isfinite().all()):
        raise ValueError("only finite floating-point numbers can be quantised")
    return F.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def quantize(
    weight: torch.Tensor, code: torch.Tensor, block: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of the nearest value for each weight (blocks × block), and the scales."""
    blocks = in_blocks(weight, block)
    scales = blocks.abs().amax(dim=1)
    middles = (code[1:] + code[:-1]) / 2
    numbers = torch.bucketize(blocks / scales.where(scales > 0, 1)[:, None], middles)
    return numbers.to(torch.uint8), scales


def dequantize(values: torch.Tensor, scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return the weight that values (blocks × block) and scales stand for."""
    return (values * scales[:, None]).flatten()[: math.prod(shape)].view(shape)


def rounded(weight: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Return the weight as it comes back from the code."""
    code = code.to(weight.device)
    numbers, scales = quantize(weight, code)
    return dequantize(code[numbers.int()], scales, weight.shape)


def rounded_q4_0(weight: torch.Tensor, block: int = 64) -> torch.Tensor:
    """Return the weight as it comes back from even steps, -8 to 7, where -8 is the largest.

    So all sixteen numbers are used: the step is negative where the largest weight is positive.
    That is Q4_0 of llama.cpp, which has blocks of 32 and 16-bit steps.
    """
    blocks = in_blocks(weight, block)
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))  # with its sign
    steps = largest.where(largest != 0, 1) / -8
    numbers = (blocks / steps).round().clamp(-8, 7)
    return dequantize(numbers, steps[:, 0], weight.shape)


def rounded_asymmetric(weight: torch.Tensor, block: int = 64) -> torch.Tensor:
    """Return the weight as it comes back from even steps between the block's least and largest.

    A zero point, the number that stands for 0, is stored beside the step, as in GPTQ and AWQ.
    """
    blocks = in_blocks(weight, block)
    least = blocks.amin(dim=1, keepdim=True).clamp(max=0)
    steps = (blocks.amax(dim=1, keepdim=True).clamp(min=0) - least) / 15
    steps = steps.where(steps > 0, 1)
    zeros = (-least / steps).round()
    numbers = ((blocks / steps).round() + zeros).clamp(0, 15)
    return dequantize(numbers - zeros, steps[:, 0], weight.shape)


def round_layers(
    model: nn.Module, names: Iterable[str], way: torch.Tensor | Callable[..., torch.Tensor]
) -> None:
    """Round the weights of the linear layers of these names, in place; they stay floats.

    The way is a code, or a function from a weight to the weight as it comes back.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.split(".")[-1] in names:
            is_code = isinstance(way, torch.Tensor)
            layer.weight.data = rounded(layer.weight, way) if is_code else way(layer.weight)


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """Put two numbers from 0 to 15 into each byte, the first one into the upper half."""
    return numbers[:, 0::2] << 4 | numbers[:, 1::2]


def unpack(packed: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Return the values (blocks × block) that the packed numbers stand for."""
    pairs = torch.cartesian_prod(code, code)  # what each byte stands for: 256 × 2
    return F.embedding(packed.int(), pairs).flatten(1)


def checksum(quantized: Callable, weights: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of all that `quantized` returns for the weights and for pieces of them."""
    digest = hashlib.sha256()
    for weight in weights:
        for piece in (weight, weight[:7, :9], weight[:33, :31]):
            for tensor in quantized(piece.contiguous()):
                digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- Layers that hold such weights --------------------------------------------------------------


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that holds its weight in 4 bits, and a scale for each 64 weights."""

    def __init__(self, linear: nn.Linear, code: torch.Tensor):
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a weight
        self.out_features, self.in_features = linear.weight.shape
        numbers, scales = quantize(linear.weight, code.to(linear.weight.device))
        self.register_buffer("packed", pack(numbers))
        self.register_buffer("scales", scales.to(linear.weight.dtype))  # exact: each is a weight's
        self.register_parameter("bias", linear.bias)
        self.code = code  # no buffer, for .to(torch.bfloat16) would round it

    @property
    def weight(self) -> torch.Tensor:
        """The weight (out × in), computed anew each time."""
        values = unpack(self.packed, self.code.to(self.packed.device))
        shape = self.out_features, self.in_features
        return dequantize(values, self.scales.float(), shape).to(self.scales.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ + b. Autograd keeps the W that this computes."""
        return F.linear(x, self.weight, self.bias)


class TimesQuantized(torch.autograd.Function):
    """x Wᵀ, whose backward pass computes W once more instead of keeping it."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer  # a reference, no copy
        return F.linear(x, layer.weight)

    @staticmethod
    def backward(ctx, delta: torch.Tensor) -> tuple:
        # delta is the gradient at the output. Under autocast it has 16 bits, and W still 32.
        return delta @ ctx.layer.weight.to(delta.dtype), None  # none for the layer


class LeanQuantizedLinear(QuantizedLinear):
    """A QuantizedLinear whose weight lives only while a product is computed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ + b; for the backward pass it keeps the layer alone."""
        product = TimesQuantized.apply(x, self)
        return product if self.bias is None else product + self.bias


def quantize_layers(
    model: nn.Module, names: Iterable[str], kind: type[QuantizedLinear], code: torch.Tensor = NF4
) -> None:
    """Replace the linear layers of these names by quantised ones, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.split(".")[-1] in names:
            model.set_submodule(name, kind(layer, code))


# --- LoRA over a coarse base --------------------------------------------------------------------


def start_factors(layer: LoRALinear, exact: torch.Tensor, start: str) -> None:
    """Start the factors from the SVD of the base's rounding error, or at random."""
    base, r = layer.base.weight.data, layer.rank
    U, S, Vh = torch.linalg.svd(exact - base, full_matrices=False)
    B = U[:, :r] * S[:r].sqrt()  # LoftQ
    A = S[:r, None].sqrt() * Vh[:r]
    if start == "random, subtracted":  # of the same size
        B = torch.randn_like(B) * B.norm() / B.numel() ** 0.5
        A = torch.randn_like(A) * A.norm() / A.numel() ** 0.5
    layer.lora_B.data, layer.lora_A.data = B, A / layer.scaling
    if start != "LoftQ":
        base -= B @ A  # so that the model starts as its base
