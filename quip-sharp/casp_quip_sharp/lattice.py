"""The E8 codebooks of QuIP# as a family: groups of 8 weights of a row to a code."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from casp.errors import UserError
from casp_quip_sharp.codebook import RESIDUAL, Effort, Shapes
from casp_quip_sharp.codebooks import DISTORTION, GAUSSIAN_SCALE, GROUP, STAGES
from casp_quip_sharp.kernels import Arguments, Product, decoded, e8p_coding, e8p_product
from casp_quip_sharp.ldlq_compiled import descend_block_compiled, round_block_compiled
from casp_quip_sharp.search import descend_block_reference, round_block_reference

CODE_NAMES = ("codes", RESIDUAL)


@dataclass(frozen=True)
class Lattice:
    """E8P12 and its residual codebooks at 1, 2, 3 or 4 bits; see `casp_quip_sharp.codebook.Codebook`."""

    bits: int
    group: int = GROUP

    effort = Effort(sweeps=4, factors=(0.95, 1.0, 1.05, 1.1, 1.2), rows=48, compared_sweeps=1)

    def __post_init__(self) -> None:
        if self.bits not in STAGES:
            raise UserError(f"--bits {self.bits} is not a format of quip-sharp; use {', '.join(map(str, STAGES))}.")

    @property
    def gaussian_scale(self) -> float:
        """See `Codebook`."""
        return GAUSSIAN_SCALE[self.bits]

    @property
    def distortion(self) -> float:
        """See `Codebook`."""
        return DISTORTION[self.bits]

    def code_dtypes(self) -> list[torch.dtype]:
        """See `Codebook`: one tensor for each stage."""
        return [stage.dtype for stage in STAGES[self.bits]]

    def round_block(self, wanted: Tensor, target: Tensor, feedback: Tensor) -> tuple[list[Tensor], Tensor]:
        """See `Codebook`; compiled on a CPU."""
        inner = round_block_compiled if target.device.type == "cpu" else round_block_reference
        return inner(wanted, target, feedback, self.bits)

    def descend_block(
        self, gradient: Tensor, hessian: Tensor, inverse: Tensor, codes: list[Tensor], points: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """See `Codebook`; compiled on a CPU."""
        inner = descend_block_compiled if points.device.type == "cpu" else descend_block_reference
        return inner(gradient, hessian, inverse, codes, points, self.bits)

    def shapes(self, out_features: int, columns: int) -> Shapes:
        """See `Codebook`: codes int16 (uint8 at 1 bit) and, at 3 and 4 bits, residual_codes, (out, columns / 8)."""
        names = zip(CODE_NAMES, self.code_dtypes(), strict=False)
        return {name: ((out_features, columns // GROUP), dtype) for name, dtype in names}

    def stored(self, codes: list[Tensor]) -> dict[str, Tensor]:
        """See `Codebook`."""
        return dict(zip(CODE_NAMES, codes, strict=False))

    def points(self, stored: Mapping[str, Tensor], out_features: int, columns: int) -> Tensor:
        """See `Codebook`."""
        return decoded(stored["codes"], stored.get(RESIDUAL), self.bits)

    def product(self, stored: Mapping[str, Tensor], out_features: int, columns: int, dtype: torch.dtype) -> Product:
        """See `Codebook`."""
        return e8p_product(stored["codes"], stored.get(RESIDUAL), self.bits, dtype)

    def coding(self, device: torch.device) -> Arguments:
        """See `Codebook`."""
        return e8p_coding(self.bits, device)

    def layer(self, codes: Tensor, residual: Tensor | None, coding: Arguments) -> tuple[str, Arguments]:
        """See `Codebook`."""
        return "layer", (codes, residual, *coding)
