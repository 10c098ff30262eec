"""The linear layer that holds QuIP#'s codes and signs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from casp.errors import UserError
from casp.kernels import run
from casp.linear import QuantizedLinear
from casp_quip_sharp.codebook import RESIDUAL, Codebook, codebook_of
from casp_quip_sharp.incoherence import original_weight, packed_signs, rotate, rotate_back, unpack_signs
from casp_quip_sharp.kernels import Constants, Layer, layer_constants, multiply_codes

SIGNS, TUNED = "signs", "tuned"  # how a format stores the vectors of both sides


def padded(in_features: int, codebook: Codebook) -> int:
    """Columns after padding with zeros to whole groups of the codebook."""
    return -(-in_features // codebook.group) * codebook.group


def tensor_shapes(
    format: Mapping[str, Any], out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of every tensor that a layer of this format stores, bias aside; UserError for others."""
    codebook, vectors = codebook_of(format), format.get("vectors", SIGNS)
    if vectors not in (SIGNS, TUNED):
        raise UserError(f"quip-sharp stores no vectors of kind {vectors!r}; use {SIGNS!r} or {TUNED!r}.")
    columns = padded(in_features, codebook)
    if vectors == TUNED:
        sides = {"out_vector": ((out_features,), torch.bfloat16), "in_vector": ((columns,), torch.bfloat16)}
    else:
        sides = {
            "out_signs": ((packed_signs(out_features),), torch.uint8),
            "in_signs": ((packed_signs(columns),), torch.uint8),
            "scale": ((), torch.float32),
        }
    return {**codebook.shapes(out_features, columns), **sides}


class QuipSharpLinear(QuantizedLinear):
    """`y = U^T W~ V x + b`: x rotated, multiplied by the decoded codes, rotated back.

    format: {"bits": ..., "codebook": "e8p" (the default)|"trellis", "states" of the latter, "vectors": "signs" (the
    default)|"tuned"}. Buffers, see `tensor_shapes`: the codebook's codes; with signs out_signs and in_signs, packed
    bits, and scale, a float32 with eight significant bits, so that bfloat16 and float16 hold it exactly; tuned:
    out_vector (out,) and in_vector (in,) bfloat16, the scale within out_vector. in is rounded up to whole groups of the
    codebook by columns of zeros.
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
        self.codebook = codebook_of(format)
        self.columns = padded(in_features, self.codebook)
        self.is_tuned = format.get("vectors", SIGNS) == TUNED
        for name, (shape, stored) in tensor_shapes(format, out_features, in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=stored, device=device))
        self._constants = self._constants_on(torch.device("cpu"))

    def _constants_on(self, device: torch.device) -> Constants:
        return layer_constants(self.codebook.coding(device), self.columns, self.out_features, device)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """What multiplies outputs (out,) and padded inputs (in,), float32: the signs, the scale with the outputs'."""
        if self.is_tuned:
            return self.out_vector.float(), self.in_vector.float()
        out_signs = unpack_signs(self.out_signs, self.out_features)
        return out_signs * self.scale.float(), unpack_signs(self.in_signs, self.columns)

    def points(self) -> Tensor:
        """What the codes stand for, in units of the scale: (out, padded in) float32."""
        return self.codebook.points(self._buffers, self.out_features, self.columns)

    def dequantize(self) -> Tensor:
        """The dense (out_features, in_features) weight, float32."""
        return original_weight(self.points(), *self.vectors())[:, : self.in_features]

    def _layer(self, dtype: torch.dtype) -> Layer:
        if self._constants.device != self.codes.device:
            self._constants = self._constants_on(self.codes.device)
        operator, matrix = self.codebook.layer(self.codes, getattr(self, RESIDUAL, None), self._constants.coding)
        if self.is_tuned:
            sides = self.in_vector, self.out_vector, None
        else:
            sides = self.in_signs, self.out_signs, self.scale
        return Layer(operator, matrix, *sides, self.bias, self._constants, dtype, self._plain)

    def _plain(self, x: Tensor) -> Tensor:
        """The layer by parts, each by what is fastest on its device; differentiable in tuned vectors too."""
        out_vector, in_vector = self.vectors()
        extra = self.columns - self.in_features
        rotated = rotate(F.pad(x.float(), (0, extra)) if extra else x.float(), in_vector)
        product = self.codebook.product(self._buffers, self.out_features, self.columns, x.dtype)
        y = rotate_back(multiply_codes(rotated, product, self.out_features), out_vector)
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features) of x's dtype; factors are rounded to no less than that.

        Differentiable in x and in tuned vectors.
        """
        return run(self._layer(x.dtype), x)
