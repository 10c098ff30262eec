"""QuIP# as a backend of the core: formats, exact bytes, tensors in and out."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from casp.backend import Matrix
from casp_quip_sharp.codebook import FAMILIES, codebook_of, rates
from casp_quip_sharp.linear import TUNED, QuipSharpLinear, tensor_shapes
from casp_quip_sharp.quantize import SharedInput, draw_signs, quantize_matrix


class QuipSharp:
    """The backend "quip-sharp". A format names bits and codebook, and "vectors": "tuned" where these are real."""

    name = "quip-sharp"
    codebooks = FAMILIES
    draft = MappingProxyType({"sweeps": 0, "search_scale": False})

    def format(self, bits: int, tuned: bool = False, codebook: str = "e8p", states: int = 8) -> dict[str, Any]:
        """The format of this width, its vectors as signs or, to be tuned, real; UserError when there is none."""
        format: dict[str, Any] = {"bits": bits}
        if codebook == "trellis":
            format |= {"codebook": codebook, "states": states}
        elif codebook != "e8p":
            format |= {"codebook": codebook}
        if tuned:
            format |= {"vectors": TUNED}
        tensor_shapes(format, 1, 1)
        return format

    def formats(
        self, out_features: int, in_features: int, *, tuned: bool = False, codebook: str = "trellis", states: int = 8
    ) -> list[dict[str, Any]]:
        """One format a width, in ascending bytes; tuned: with real vectors; codebook, states: as in `format`."""
        return [self.format(bits, tuned, codebook, states) for bits in sorted(rates(codebook, states))]

    def bytes(self, format: Mapping[str, Any], out_features: int, in_features: int) -> int:
        """Exact bytes of codes (inputs padded to whole groups), packed signs or vectors, and the scale."""
        shapes = tensor_shapes(format, out_features, in_features)
        return sum(prod(shape) * dtype.itemsize for shape, dtype in shapes.values())

    def distortion(self, format: Mapping[str, Any], out_features: int, in_features: int) -> float:
        """Mean squared error of the format's codebook on N(0, 1), at the best scale."""
        return codebook_of(format).distortion

    def quantize(
        self,
        weight: Tensor,
        hessian: Tensor,
        format: Mapping[str, Any],
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> dict[str, Tensor]:
        """Quantize `weight` (out, in) under `hessian` (in, in): a group of one, see `quantize_group`.

        generator draws the signs of both sides (a CPU generator, whatever the weight's device).
        """
        one = Matrix(weight, format, generator, settings.pop("name", "weight"))
        return next(self.quantize_group([one], hessian, [0], **settings))

    def quantize_group(
        self,
        matrices: Sequence[Matrix],
        hessian: Tensor,
        wanted: Sequence[int],
        *,
        damping: float = 0.01,
        **settings: Any,
    ) -> Iterator[dict[str, Tensor]]:
        """Quantize those numbered `wanted` of matrices that share an input, its signs and the moment in that basis.

        The first matrix draws these signs, wanted or not, each those of its outputs. settings: those of
        `quantize_matrix`.
        """
        shared = SharedInput(hessian, damping, matrices[0].name)
        for number, one in enumerate(matrices):
            tuned = one.format.get("vectors") == TUNED
            codebook = codebook_of(one.format)
            if number not in wanted:
                draw_signs(*one.weight.shape, shared, codebook, one.generator)
                continue
            yield quantize_matrix(one.weight, shared, codebook, one.generator, tuned=tuned, name=one.name, **settings)

    def linear(
        self,
        out_features: int,
        in_features: int,
        bias: bool,
        format: Mapping[str, Any],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> QuipSharpLinear:
        """An empty layer whose state dict takes what `quantize` returns."""
        return QuipSharpLinear(out_features, in_features, bias, format, dtype, device)

    def tunable(self, module: nn.Module) -> dict[str, Tensor]:
        """What fine-tuning may move: the vectors of a format that holds them as real numbers, and a bias."""
        names = ("out_vector", "in_vector", "bias") if module.is_tuned else ("bias",)
        tensors = {name: getattr(module, name) for name in names}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}
