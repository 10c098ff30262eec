"""What a GPTQ layer asks of the registry of kernels (`casp.kernels`)."""

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

    qweight, qzeros, scales, bits, group_size: as `GPTQLinear` stores them; dense: the weight, (out, in) float32.
    Up to 16 vectors the operator rounds x, in blocks of at most 128 columns of one group, to 14 bits and a sign: an
    error of at most 1 / 16510 of a block's largest number, well within bfloat16's. Longer prompts are multiplied by the
    decoded weight in x's dtype.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bits: int
    group_size: int
    bias: Tensor | None
    dense: Callable[[], Tensor]
    operator: str = "gptq_layer"

    @property
    def trains(self) -> bool:
        """See `casp.kernels.Kernel`."""
        return any(tensor is not None and tensor.requires_grad for tensor in (self.scales, self.bias))

    def fits(self, x: Tensor) -> bool:
        """All but float64, which asks for more digits than there are, and scales that are being trained in float32."""
        return x.dtype != torch.float64 and self.scales.dtype == torch.float16

    def arguments(self) -> tuple[Any, ...]:
        """See `casp.kernels.Kernel`."""
        half = multiplies_natively(torch.bfloat16)
        return self.qweight, self.qzeros, self.scales, self.bits, self.group_size, self.bias, half

    def reference(self, x: Tensor) -> Tensor:
        """See `casp.kernels.Kernel`."""
        return F.linear(x, self.dense().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
