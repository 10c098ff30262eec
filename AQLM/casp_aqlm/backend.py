"""AQLM as a backend of the core: formats, exact bytes, tensors in and out."""

import math
from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from casp_aqlm.linear import AQLMLinear
from casp_aqlm.quantize import quantize_matrix
from casp_aqlm.scheme import Scheme

OFFERED = ("1x8g8", "2x6g8", "2x8g8", "1x10g4", "3x8g8", "4x8g8")
"""The schemes among which bytes are shared out, by their bits."""

SMALLER = {"2x8g8": "1x8g4", "3x8g8": "2x6g4", "4x8g8": "2x8g4"}
"""Of as many bits with codebooks an eighth to a quarter the size: what small matrices and low-rank factors are for."""

_WORTH = 0.94
"""Share of the bytes up to which the smaller codebooks are the better deal: on demo-llama 1x8g4 has 1.2 times the error
of 2x8g8, which an eighth of a bit makes good (eval/results/aqlm)."""

_WORTH_A_BYTE = 0.993
"""The same for codebooks of int8 instead of float16, which add 1.5% to 2% to the error (eval/results/aqlm)."""


DISTORTIONS = {
    "1x8g8": 0.322,
    "2x6g8": 0.177,
    "1x8g4": 0.0973,
    "2x8g8": 0.0892,
    "1x10g4": 0.0494,
    "2x6g4": 0.0295,
    "3x8g8": 0.0287,
    "4x8g8": 0.0089,
    "2x8g4": 0.0078,
}
"""Mean squared error of N(0, 1) at each scheme, codebooks fitted to far more vectors than they have entries."""

_FITTED, _FITS = 3.2, 0.25
"""With n entries for N vectors the error is smaller by exp(-3.2 n / N), up to a quarter as many entries as vectors.
tests/aqlm/test_backend.py holds both to 15%, of three codebooks, whose exponent is nearer to 4, to 25%."""


class AQLM:
    """The backend "aqlm". A format is {"scheme": "MxBgG", "entries": "float16"|"int8"|"float8", "bits": M B / G}."""

    name = "aqlm"
    draft = MappingProxyType({"max_rounds": 1})
    fine = 0.1
    """From 2 bits on errors are to each other as these distortions: on four matrices of demo-llama what is told so is
    right within 6%, 3x8g8 and 4x8g8 up to 10% and 26% too cheap (eval/results/aqlm/prices.json)."""
    least_sample = 1 << 17
    """Codebooks fitted to few vectors flatter: on 64 rows of demo-llama 4x8g8 has at most half of its error on all."""

    def format(self, scheme: str, entries: str = "float16") -> dict[str, Any]:
        """The format of a scheme written as MxBgG and the dtype of its codebooks; UserError when there is none."""
        return Scheme.parse(scheme, entries).format

    def formats(
        self, out_features: int, in_features: int, *, tuned: bool = False, entries: str | None = None
    ) -> list[dict[str, Any]]:
        """One scheme for 1, 1.5, 2, 2.5, 3 and 4 bits, in ascending bytes; every one of them can be tuned.

        Where codebooks would outweigh what they bring, those of shorter groups stand in. entries: their dtype, None for
        the better deal of float16 and int8.
        """

        def size(format: Mapping[str, Any]) -> int:
            return self.bytes(format, out_features, in_features)

        def better(usual: dict[str, Any], smaller: dict[str, Any], worth: float) -> dict[str, Any]:
            return smaller if size(smaller) <= worth * size(usual) else usual

        def stored(scheme: str) -> dict[str, Any]:
            if entries is not None:
                return self.format(scheme, entries)
            return better(self.format(scheme, "float16"), self.format(scheme, "int8"), _WORTH_A_BYTE)

        found = [better(stored(scheme), stored(SMALLER.get(scheme, scheme)), _WORTH) for scheme in OFFERED]
        return sorted(found, key=size)

    def bytes(self, format: Mapping[str, Any], out_features: int, in_features: int) -> int:
        """Exact bytes of codes (inputs padded to whole groups), codebooks and scales."""
        shapes = Scheme.of(format).tensor_shapes(out_features, in_features)
        return sum(prod(shape) * dtype.itemsize for shape, dtype in shapes.values())

    def distortion(self, format: Mapping[str, Any], out_features: int, in_features: int) -> float:
        """Mean squared error of N(0, 1); infinite, so that it is tried, where it is not known: of other schemes, and of
        matrices with few vectors for the entries.
        """
        scheme = Scheme.of(format)
        fitted = scheme.codebooks * scheme.size / (out_features * scheme.groups(in_features))
        told = DISTORTIONS.get(str(scheme), math.inf)
        return told * math.exp(-_FITTED * fitted) if fitted <= _FITS else math.inf

    def quantize(
        self,
        weight: Tensor,
        hessian: Tensor,
        format: Mapping[str, Any],
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> dict[str, Tensor]:
        """Quantize `weight` (out, in) under `hessian` (in, in); `settings` are those of `quantize_additive`.

        generator draws the vectors that the codebooks start from (a CPU generator, whatever the weight's device).
        """
        return quantize_matrix(weight, hessian, Scheme.of(format), generator or torch.Generator(), **settings)

    def linear(
        self,
        out_features: int,
        in_features: int,
        bias: bool,
        format: Mapping[str, Any],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> AQLMLinear:
        """An empty layer whose state dict takes what `quantize` returns."""
        return AQLMLinear(out_features, in_features, bias, format, dtype, device)

    def tunable(self, module: nn.Module) -> dict[str, Tensor]:
        """What fine-tuning may move: codebooks, scales of the rows, and the bias if there is one."""
        tensors = {"codebooks": module.codebooks, "scales": module.scales, "bias": module.bias}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}
