"""What a family of codebooks offers at one rate: rounding columns, storing what was chosen, and reading it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from casp.errors import UserError
from casp_quip_sharp.kernels import Arguments, Product

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Effort:
    """How hard a codebook is searched by default.

    sweeps: most rounds of coordinate descent after LDLQ; factors: the scales that are compared, relative to the
    Gaussian's, on `rows` rows (after the rotation all rows are alike) after LDLQ and `compared_sweeps` sweeps.
    """

    sweeps: int
    factors: tuple[float, ...]
    rows: int
    compared_sweeps: int


class Codebook(Protocol):
    """A family of codebooks at one rate. Codes are kept, while rounding, as tensors (out, in / group)."""

    bits: int
    group: int
    """Columns that are rounded together; a matrix is padded to a multiple of it."""
    gaussian_scale: float
    """The scale at which N(0, 1) is met with the least mean squared error."""
    distortion: float
    """That error."""

    effort: Effort

    def code_dtypes(self) -> list[torch.dtype]:
        """Of the tensors of codes."""

    def round_block(self, wanted: Tensor, target: Tensor, feedback: Tensor) -> tuple[list[Tensor], Tensor]:
        """Codes and points (rows, width) of a block of columns, the last group first.

        wanted, target: (rows, width), with and without the feedback of the blocks that are done; feedback: within the
        block, (width, width).
        """

    def descend_block(
        self, gradient: Tensor, hessian: Tensor, inverse: Tensor, codes: list[Tensor], points: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """New codes of a block of columns and how far its points move, (rows, width); the last group first.

        gradient: E H of the block, (rows, width); hessian: (width, width); inverse: of its groups,
        (width / group, group, group); codes and points: as they are, not changed.
        """

    def shapes(self, out_features: int, columns: int) -> Shapes:
        """Name -> (shape, dtype) of the tensors that hold a matrix's codes."""

    def stored(self, codes: list[Tensor]) -> dict[str, Tensor]:
        """The codes of a whole matrix as the tensors that `shapes` describes."""

    def points(self, stored: Mapping[str, Tensor], out_features: int, columns: int) -> Tensor:
        """What the stored codes stand for, in units of the scale: (out, columns) float32."""

    def product(self, stored: Mapping[str, Tensor], out_features: int, columns: int, dtype: torch.dtype) -> Product:
        """The kernel of `x P^T` of x (vectors, columns) and these points; factors rounded to no less than `dtype`."""

    def coding(self, device: torch.device) -> Arguments:
        """What stored codes mean, for the operators of quiptools."""

    def layer(self, codes: Tensor, residual: Tensor | None, coding: Arguments) -> tuple[str, Arguments]:
        """The operator of quiptools that computes a whole layer, and its arguments that describe the matrix.

        codes, residual: what is stored as "codes" and, where there is such, `RESIDUAL`; coding: see `coding`.
        """


FAMILIES = ("e8p", "trellis")
RESIDUAL = "residual_codes"


def rates(family: str, states: int = 8) -> list[int]:
    """The bits a weight that a family offers, ascending; states: of the trellis."""
    from casp_quip_sharp.codebooks import STAGES
    from casp_quip_sharp.trellis.tables import rates as trellis_rates

    return sorted(STAGES) if family == "e8p" else trellis_rates(states)


def codebook_of(format: Mapping[str, Any]) -> Codebook:
    """The codebook that a format names; UserError where it names none."""
    # Imported here, since both describe themselves in the words of this module.
    from casp_quip_sharp.lattice import Lattice
    from casp_quip_sharp.trellis.codebook import Trellis

    family = format.get("codebook", "e8p")
    if family == "e8p":
        return Lattice(format["bits"])
    if family == "trellis":
        return Trellis(format["bits"], format.get("states", 8))
    raise UserError(f"quip-sharp has no codebook {family!r}; use {' or '.join(FAMILIES)}.")
