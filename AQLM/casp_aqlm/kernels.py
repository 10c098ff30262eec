"""What an AQLM layer asks of the registry of kernels (`casp.kernels`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from casp.kernels import multiplies_natively


@dataclass(frozen=True)
class Layer:
    """`y = x W^T + b`, x (..., in) and y (..., out) of x's dtype, multiplied straight from the packed codes.

    codes, codebooks, scales, code_bits: as `AQLMLinear` stores them; dense: the weight, (out, in) float32. Up to 8
    vectors the operator adds up what the codes look up in tables of the vectors' products with all codewords (codes of
    at most 8 bits) or the products with the codewords themselves (larger codes), in float32; for x of half precision
    what is looked up may be rounded to 16 bits. Longer prompts are
    multiplied by the decoded weight in x's dtype.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    code_bits: int
    bias: Tensor | None
    dense: Callable[[], Tensor]
    operator: str = "aqlm_layer"

    @property
    def trains(self) -> bool:
        """See `casp.kernels.Kernel`."""
        return any(tensor is not None and tensor.requires_grad for tensor in (self.codebooks, self.scales, self.bias))

    def fits(self, x: Tensor) -> bool:
        """All but float64, which asks for more digits than there are, and scales that are being trained in float32."""
        return x.dtype != torch.float64 and self.scales.dtype == torch.float16

    def arguments(self) -> tuple[Any, ...]:
        """See `casp.kernels.Kernel`."""
        half = multiplies_natively(torch.bfloat16)
        return self.codes, self.codebooks.half(), self.scales, self.code_bits, self.bias, half

    def reference(self, x: Tensor) -> Tensor:
        """See `casp.kernels.Kernel`."""
        return F.linear(x, self.dense().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
