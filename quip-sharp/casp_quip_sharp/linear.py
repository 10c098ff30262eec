"""The linear layer that holds QuIP#'s codes and signs; plain PyTorch, the reference for kernels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from casp.errors import UserError
from casp.linear import QuantizedLinear
from casp_quip_sharp.codebooks import GROUP, STAGES, decode
from casp_quip_sharp.incoherence import original_weight, packed_signs, rotate, rotate_back

CODE_NAMES = ("codes", "residual_codes")


def padded(in_features: int) -> int:
    """Columns after padding with zeros to whole groups of 8."""
    return -(-in_features // GROUP) * GROUP


def tensor_shapes(bits: int, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of every tensor that a layer of this format stores, bias aside; UserError for others."""
    if bits not in STAGES:
        raise UserError(f"--bits {bits} is not a format of quip-sharp; use {', '.join(map(str, STAGES))}.")
    columns = padded(in_features)
    codes = {
        name: ((out_features, columns // GROUP), stage.dtype)
        for name, stage in zip(CODE_NAMES, STAGES[bits], strict=False)
    }
    return {
        **codes,
        "out_signs": ((packed_signs(out_features),), torch.uint8),
        "in_signs": ((packed_signs(columns),), torch.uint8),
        "scale": ((), torch.float32),
    }


class QuipSharpLinear(QuantizedLinear):
    """`y = U^T W~ V x + b`: x rotated, multiplied by the decoded codes, rotated back.

    Buffers, see `tensor_shapes`: codes int16 (out, in / 8) (uint8 at 1 bit), at 3 and 4 bits residual_codes (uint8,
    int16) of the same shape; out_signs and in_signs, packed bits; scale, a float32 with eight significant bits, so
    that bfloat16 and float16 hold it exactly. in is rounded up to a multiple of 8 by columns of zeros.
    format: {"bits": 1|2|3|4}.
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
        self.bits = int(format["bits"])
        for name, (shape, stored) in tensor_shapes(self.bits, out_features, in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=stored, device=device))

    def incoherent(self) -> Tensor:
        """W~, what the codes stand for: (out, padded in) float32."""
        stages = STAGES[self.bits]
        points = decode(self.codes, stages[0])
        if len(stages) > 1:
            points += decode(self.residual_codes, stages[1])
        return points.view(self.out_features, -1).mul_(self.scale.float())

    def dequantize(self) -> Tensor:
        """The dense (out_features, in_features) weight, float32."""
        dense = original_weight(self.incoherent(), self.out_signs, self.in_signs)
        return dense[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features); result and matrix product are in x's dtype."""
        columns = padded(self.in_features)
        rotated = rotate(F.pad(x.float(), (0, columns - self.in_features)), self.in_signs)
        product = F.linear(rotated.to(x.dtype), self.incoherent().to(x.dtype))
        y = rotate_back(product.float(), self.out_signs)
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)
