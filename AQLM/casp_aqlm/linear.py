"""The linear layer of codes, codebooks and scales; decoding in plain PyTorch is the reference for kernels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from casp.kernels import has_operator, run, warn_of_plain_pytorch
from casp.linear import QuantizedLinear
from casp_aqlm.kernels import Layer
from casp_aqlm.packing import unpack
from casp_aqlm.scheme import Scheme


def decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """The sums of codewords that `codes` (rows, groups, M) stand for: (rows, groups * g), of the codebooks' dtype.

    codebooks: (M, entries, g). Differentiable in the codebooks.
    """
    total = F.embedding(codes[..., 0], codebooks[0])
    for place in range(1, len(codebooks)):
        total = total + F.embedding(codes[..., place], codebooks[place])
    return total.flatten(1)


class AQLMLinear(QuantizedLinear):
    """`y = x W^T + b`, a group of W the sum of M codewords times the scale of its row.

    format: {"scheme": "MxBgG", "entries": "float16"|"int8"|"float8"}, see `casp_aqlm.scheme`. Buffers: codes uint8
    (out, ceil(groups M B / 8)), those of a row packed group by group, a group's by codebook; codebooks (M, 2^B, g);
    scales float16 (out,). in is rounded up to a multiple of g by columns of zeros.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        bias: bool,
        format: Mapping[str, Any],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(out_features, in_features, bias, format, dtype, device)
        self.scheme = Scheme.of(format)
        for name, (shape, stored) in self.scheme.tensor_shapes(out_features, in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=stored, device=device))

    def unpacked_codes(self) -> Tensor:
        """Codes (out, groups, M) int32."""
        scheme = self.scheme
        count = scheme.groups(self.in_features) * scheme.codebooks
        return unpack(self.codes, scheme.code_bits, count).view(self.out_features, -1, scheme.codebooks)

    def dequantize(self) -> Tensor:
        """The dense (out_features, in_features) weight, float32; differentiable in codebooks and scales."""
        points = decode(self.unpacked_codes(), self.codebooks.float())
        return points[:, : self.in_features] * self.scales.float()[:, None]

    def kernel(self) -> Layer:
        """What `casp.kernels` runs."""
        return Layer(self.codes, self.codebooks, self.scales, self.scheme.code_bits, self.bias, self.dequantize)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features) of x's dtype, differentiable in x, codebooks and scales."""
        layer = self.kernel()
        if not has_operator(layer.operator, x.device.type):
            warn_of_plain_pytorch(x.device.type)
        return run(layer, x)
