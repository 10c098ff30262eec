"""What GPTQ needs of a second moment: the order of the columns, a factor and the damped moment for the refinement."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from casp.moments import damped_, damped_cholesky
from casp.moments.symmetric import panels

_ROWS = 512  # of the factor that are put in order at once


def processing_order(hessian: Tensor, act_order: bool) -> Tensor:
    """Columns in the order in which they are rounded: as they stand, or (act-order) largest input first."""
    diagonal = hessian.diagonal()
    if not act_order:
        return torch.arange(len(diagonal), device=diagonal.device)
    return torch.argsort(diagonal, descending=True, stable=True)


@dataclass(frozen=True)
class Moment:
    """A second moment H (in, in) made ready for rounding; of use to every matrix that takes this input.

    order: (in,), see `processing_order`; lower: R^T (in, in) float32, lower triangular, `H + damping = R R^T` with rows
    and columns in that order: what a column takes from those before it is its row; damping: the share of the mean
    diagonal used, infinity where H has no factor (`damped_cholesky`).
    """

    hessian: Tensor
    order: Tensor
    lower: Tensor
    damping: float
    _kept: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, hessian: Tensor, damping: float, act_order: bool, name: str) -> "Moment":
        """Order and factor `hessian`; UserError as `damped_cholesky`, which calls it `name`."""
        order = processing_order(hessian, act_order)
        # Reversing both axes turns the lower factor that Cholesky gives into the upper one that is needed.
        backwards = order.flip(0)
        flipped, used = damped_cholesky(hessian[backwards[:, None], backwards], damping, name)
        flipped = flipped.float()
        lower = torch.empty_like(flipped)
        for rows in panels(len(lower), _ROWS):
            lower[rows] = flipped[:, len(lower) - rows.stop : len(lower) - rows.start].flip(0, 1).T
        return cls(hessian, order, lower, used)

    def damped(self) -> Tensor:
        """The damped moment, float32, columns as they stand; made when it is first asked for."""
        if not self._kept:
            extra = 0.0 if math.isinf(self.damping) else self.damping
            self._kept.append(damped_(self.hessian.to(torch.float32, copy=True), extra))
        return self._kept[0]
