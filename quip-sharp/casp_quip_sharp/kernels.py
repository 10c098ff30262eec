"""The product of activations and codes, `x P^T`, by the fastest implementation that can do it.

`Reference` decodes P in plain PyTorch and multiplies. It works for everything, is differentiable in x, and is what the
kernels of `quiptools` are tested against. They multiply up to 16 vectors straight from the codes; for more, they decode
in tiles and leave the product to the matrix library.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from casp_quip_sharp.codebooks import STAGES, UNIT, decode, half_patterns, odd_negatives, table
from casp_quip_sharp.compiled import has_cuda_kernels, operators, warn_of_plain_pytorch

# The product before the scale is some 30 times the output: float16 would overflow where outputs are large.
_HEADROOM = 32
LARGEST_DIRECT_BATCH = 16  # the most vectors that the kernels multiply straight from the codes


class Implementation(Protocol):
    """One way to compute the product."""

    name: str

    def can(self, x: Tensor) -> bool:
        """Whether it takes these vectors, (batch, in) float32, on their device, outside or inside of training."""

    def product(self, x: Tensor, codes: Tensor, residual_codes: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
        """What `product` of this module says, for x (batch, in)."""


def decoded(codes: Tensor, residual_codes: Tensor | None, bits: int) -> Tensor:
    """P, what the codes (out, in / 8) stand for in units of the scale: (out, in) float32."""
    stages = STAGES[bits]
    points = decode(codes, stages[0])
    if residual_codes is not None:
        points += decode(residual_codes, stages[1])
    return points.view(len(codes), -1)


def multiply(x: Tensor, points: Tensor, dtype: torch.dtype) -> Tensor:
    """`x points^T` with factors rounded to `dtype`, float32."""
    if dtype == torch.float32:
        return F.linear(x, points)
    return F.linear((x / _HEADROOM).to(dtype), points.to(dtype)).float() * _HEADROOM


@dataclass(frozen=True)
class Reference:
    """Decode, then multiply in `dtype`: plain PyTorch, any device."""

    name: str = "reference"

    def can(self, x: Tensor) -> bool:
        """Always."""
        return True

    def product(self, x: Tensor, codes: Tensor, residual_codes: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
        """See `Implementation`."""
        return multiply(x, decoded(codes, residual_codes, bits), dtype)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """What the kernels look up, (256, 8) float32 both: patterns, with the sign that parity asks for, and E8 points."""
    patterns = half_patterns().copy()
    patterns[odd_negatives(patterns), -1] *= -1
    return torch.from_numpy(patterns).to(device, torch.float32), table("e8", device).float() * UNIT


def _arguments(codes: Tensor, residual_codes: Tensor | None, bits: int) -> tuple[Tensor | float | None, ...]:
    """What every operator of quiptools takes to know the matrix."""
    return codes, residual_codes, *_tables(codes.device), STAGES[bits][-1].scale


def _needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


@cache
def _multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in `dtype`; without them float32 is several times faster."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype == torch.float16 and torch.cpu._is_amx_fp16_supported()


@dataclass(frozen=True)
class CompiledCPU:
    """The kernels of one instruction set, in float32 whatever `dtype` allows.

    Only many vectors are multiplied in `dtype`, where the CPU has instructions for that.
    """

    instruction_set: str

    @property
    def name(self) -> str:
        """cpu-avx2 and the like."""
        return f"cpu-{self.instruction_set}"

    def can(self, x: Tensor) -> bool:
        """Anything on a CPU outside of training."""
        return x.device.type == "cpu" and not _needs_gradient(x)

    def product(self, x: Tensor, codes: Tensor, residual_codes: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
        """See `Implementation`."""
        arguments = _arguments(codes, residual_codes, bits)
        if len(x) > LARGEST_DIRECT_BATCH and _multiplies_natively(dtype):
            return multiply(x, operators().decode(*arguments, self.instruction_set), dtype)
        return operators().product(x, *arguments, self.instruction_set)


@dataclass(frozen=True)
class CompiledCUDA:
    """The CUDA kernels: straight from the codes for small batches, in float32; else decode and cuBLAS in `dtype`."""

    name: str = "cuda"

    def can(self, x: Tensor) -> bool:
        """Anything on a CUDA device outside of training."""
        return x.device.type == "cuda" and not _needs_gradient(x)

    def product(self, x: Tensor, codes: Tensor, residual_codes: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
        """See `Implementation`."""
        arguments = _arguments(codes, residual_codes, bits)
        if len(x) > LARGEST_DIRECT_BATCH:
            return multiply(x, operators().decode(*arguments), dtype)
        return operators().product(x, *arguments)


@cache
def implementations() -> tuple[Implementation, ...]:
    """Those of this machine, the fastest first; the reference, which can do everything, is last."""
    if operators() is None:
        return (Reference(),)
    on_cpu = (CompiledCPU(name) for name in operators().instruction_sets())
    on_cuda = (CompiledCUDA(),) if has_cuda_kernels() else ()
    return (*on_cpu, *on_cuda, Reference())


def product(x: Tensor, codes: Tensor, residual_codes: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """`x P^T`, (..., out) float32, for the P (out, in) that `codes` stand for in units of the scale.

    x: (..., in) float32, in a multiple of 8; codes: (out, in / 8), int16 or at 1 bit uint8; residual_codes: at 3 and 4
    bits (out, in / 8), uint8 or int16; dtype: what the factors may be rounded to. Where autograd needs the gradient in
    x, the reference computes the product; where only the kernels of this device are missing, a warning says so once.
    """
    vectors = x.reshape(-1, x.shape[-1])
    chosen = next(one for one in implementations() if one.can(vectors))
    if isinstance(chosen, Reference) and not _needs_gradient(vectors):
        warn_of_plain_pytorch(x.device.type)
    return chosen.product(vectors, codes, residual_codes, bits, dtype).view(*x.shape[:-1], len(codes))
