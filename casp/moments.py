"""Second moments of what a linear layer meets, and their Cholesky factor.

Every method here weighs an error ``D`` of a weight by ``tr(D H D^T)`` with ``H = E[x x^T]``, the mean over
the calibration tokens of the outer product of the layer's input (GPTQ, arXiv 2210.17323; CASP, 2503.05936).
"""

import logging
import math

import torch
from torch import Tensor

from casp.errors import UserError

log = logging.getLogger(__name__)

_FIRST_DAMPING = 1e-8  # where the retries start when the caller asked for no damping at all
_ROUNDING = 1e-6  # of the trace: how far below 0 rotating a moment of few tokens may leave an entry of the diagonal
_NOT_FINITE = (
    "the second moment of its inputs holds NaN or infinity; check the model's weights and the calibration data, or run "
    "in a wider --dtype"
)
_TRIES = 12  # each retry damps ten times more: from 1e-8 that ends at a thousand times the mean diagonal


class SecondMoment:
    """The running (weighted) mean of ``x x^T``.

    Products are taken in float32 and summed in float64: the sum over millions of tokens then keeps the small
    eigenvalues that whitening and the Cholesky factor need.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.count = 0.0
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add the tokens ``x`` (..., size), any float dtype; ``weights`` (...) at least 0, 1 when absent.

        A token of weight 0 (padding) is left out, not multiplied by 0: whatever it holds, NaN included,
        counts for nothing. A weight of NaN is no padding: it makes the mean NaN, which `checked` tells.
        """
        x = x.detach().reshape(-1, self.size).to(self._sum.device, torch.float32)
        if weights is None:
            self.count += x.shape[0]
        else:
            weights = weights.detach().reshape(-1).to(self._sum.device, torch.float32)
            kept = weights != 0
            x, weights = x[kept], weights[kept]
            self.count += weights.sum(dtype=torch.float64).item()
            x = x * weights.sqrt()[:, None]
        self._sum += x.T @ x

    def value(self) -> Tensor:
        """The mean ``E[x x^T]`` (size, size) in float64; all zeros when no token was added."""
        return self._sum / self.count if self.count else self._sum.clone()

    def checked(self, name: str) -> Tensor:
        """As `value`; UserError, which calls the moment `name`, for NaN or infinity and where no token counted."""
        if not self.count:
            raise UserError(f"{name}: no calibration token counts for it; give other calibration data")
        found = self.value()
        if not torch.isfinite(found).all():
            raise UserError(f"{name}: {_NOT_FINITE}")
        return found


def damped_cholesky(matrix: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """Cholesky factor of a second moment, damped until it exists.

    ``matrix`` (n, n) is symmetrised and ``damping * mean(diagonal)`` added to its diagonal; when the
    factorisation fails, ten times more, a bounded number of times, with a warning that gives ``name`` (the
    layer) and the damping. An input that never occurs (a zero on the diagonal) gets the mean diagonal, so
    that it stays apart from all others; the mean is over the inputs that do occur.

    Returns the lower factor (n, n) in float64 on the matrix's device, and the damping used. Where no damping helps,
    what the field's tools fall back to: the factor of the damped diagonal alone, under which errors of one column are
    not made good by others (plain rounding), infinity as its damping, and a warning. Raises UserError for NaN or
    infinity, and for a diagonal that is negative by more than rounding.
    """
    matrix = matrix.to(torch.float64)
    if not torch.isfinite(matrix).all():
        raise UserError(f"{name}: {_NOT_FINITE}")
    matrix = (matrix + matrix.T) / 2
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    if (diagonal < -_ROUNDING * diagonal.abs().sum()).any():
        raise UserError(f"{name}: the second moment of its inputs has a negative diagonal; recompute it")
    diagonal.clamp_(min=0)
    mean = diagonal[~dead].mean().item() if not dead.all() else 1.0
    diagonal[dead] = mean
    tried = damping
    for _ in range(_TRIES):
        damped = matrix.clone()
        damped.diagonal().add_(tried * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            if tried != damping:
                log.warning("%s: no Cholesky factor at damping %g; used %g", name, damping, tried)
            return lower, tried
        tried = max(tried * 10, _FIRST_DAMPING)
    log.warning(
        "%s: no Cholesky factor even at damping %g; rounded without feedback: give more calibration samples",
        name,
        tried / 10,
    )
    return (diagonal + max(damping, _FIRST_DAMPING) * mean).sqrt().diag(), math.inf
