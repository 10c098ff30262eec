"""The trellis as a family of codebooks: one weight of a column after the other, `bits` for each."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from casp_quip_sharp.codebook import Effort, Shapes
from casp_quip_sharp.kernels import Arguments, Product
from casp_quip_sharp.trellis.columns import descend_columns, round_columns
from casp_quip_sharp.trellis.layout import STRIP, from_storage, stored_bytes, to_storage
from casp_quip_sharp.trellis.tables import table, values
from casp_quip_sharp.trellis.walks import walk_states


@dataclass(frozen=True)
class Trellis:
    """A trellis of 2^states states at `bits` bits a weight; see `casp_quip_sharp.codebook.Codebook`.

    UserError where the package holds no table for it.
    """

    bits: int
    states: int = 8
    group: int = 1

    effort = Effort(sweeps=1, factors=(1.0, 1.08, 1.2), rows=48, compared_sweeps=0)

    def __post_init__(self) -> None:
        table(self.states, self.bits)

    @property
    def gaussian_scale(self) -> float:
        """See `Codebook`."""
        return table(self.states, self.bits).scale

    @property
    def distortion(self) -> float:
        """See `Codebook`."""
        return table(self.states, self.bits).nmse

    def values(self, device: torch.device) -> Tensor:
        """What each state stands for, (2^states) float32."""
        return values(self.states, self.bits, device)

    def code_dtypes(self) -> list[torch.dtype]:
        """See `Codebook`: the bits that each step stores, a byte for each while rounding."""
        return [torch.uint8]

    def round_block(self, wanted: Tensor, target: Tensor, feedback: Tensor) -> tuple[list[Tensor], Tensor]:
        """See `Codebook`."""
        symbols, points = round_columns(wanted, target, feedback, self.values(target.device), self.bits)
        return [symbols], points

    def descend_block(
        self, gradient: Tensor, hessian: Tensor, inverse: Tensor, codes: list[Tensor], points: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """See `Codebook`; what `inverse` says stands on the diagonal of `hessian` too."""
        found, moves = descend_columns(gradient, hessian, codes[0], points, self.values(points.device), self.bits)
        return [found], moves

    def shapes(self, out_features: int, columns: int) -> Shapes:
        """See `Codebook`: codes, the bytes of `casp_quip_sharp.trellis.layout`."""
        return {"codes": ((stored_bytes(out_features, columns, self.bits),), torch.uint8)}

    def stored(self, codes: list[Tensor]) -> dict[str, Tensor]:
        """See `Codebook`."""
        return {"codes": to_storage(codes[0], self.bits)}

    def points(self, stored: Mapping[str, Tensor], out_features: int, columns: int) -> Tensor:
        """See `Codebook`."""
        symbols = from_storage(stored["codes"], out_features, columns, self.bits)
        known = self.values(symbols.device)
        return torch.cat([known[walk_states(strip, self.bits, self.states)] for strip in symbols.split(STRIP)])

    def coding(self, device: torch.device) -> Arguments:
        """See `Codebook`."""
        return self.bits, *table(self.states, self.bits).kernel_tensors(device)

    def product(self, stored: Mapping[str, Tensor], out_features: int, columns: int, dtype: torch.dtype) -> Product:
        """See `Codebook`."""
        matrix = (stored["codes"], out_features, *self.coding(stored["codes"].device))
        return Product("trellis_product", matrix, lambda: self.points(stored, out_features, columns), dtype)

    def layer(self, codes: Tensor, residual: Tensor | None, coding: Arguments) -> tuple[str, Arguments]:
        """See `Codebook`."""
        return "trellis_layer", (codes, *coding)
