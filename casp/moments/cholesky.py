"""The Cholesky factor of a second moment, which may be singular or hold inputs that never occur."""

import logging
import math

from torch import Tensor

from casp.errors import UserError
from casp.linear import is_finite
from casp.moments.second_moment import NOT_FINITE, sum_dtype
from casp.moments.symmetric import cholesky_, mirror_, symmetrise_

log = logging.getLogger(__name__)

_FIRST_DAMPING = 1e-8  # where the retries start when the caller asked for no damping at all
_ROUNDING = 1e-6  # of the trace: how far below 0 rotating a moment of few tokens may leave an entry of the diagonal
_TRIES = 12  # each retry damps ten times more: from 1e-8 that ends at a thousand times the mean diagonal


def damped_(matrix: Tensor, damping: float) -> Tensor:
    """Add to the symmetric `matrix` (n, n) what `damped_cholesky` factors at its first try; returns it."""
    diagonal = matrix.diagonal()
    occurring = diagonal > 0
    mean = diagonal[occurring].mean() if occurring.any() else diagonal.new_ones(())
    diagonal.copy_(diagonal.where(occurring, mean) + damping * mean)
    return matrix


def damped_cholesky(matrix: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """Cholesky factor of a second moment, damped until it exists.

    ``matrix`` (n, n) is symmetrised and ``damping * mean(diagonal)`` added to its diagonal; when the
    factorisation fails, ten times more, a bounded number of times, with a warning that gives ``name`` (the
    layer) and the damping. An input that never occurs (a zero on the diagonal) gets the mean diagonal, so
    that it stays apart from all others; the mean is over the inputs that do occur.

    Returns the lower factor (n, n) on the matrix's device, and the damping used. The factor has the dtype that a moment
    of this width is summed in (`SecondMoment`: float64, beyond 8,192 float32) and is the only matrix held besides the
    given one. Where no damping helps, what the field's tools fall back to: the factor of the damped diagonal alone,
    under which errors of one column are not made good by others (plain rounding), infinity as its damping, and a
    warning. Raises UserError for NaN or infinity, and for a diagonal that is negative by more than rounding.
    """
    lower = matrix.to(sum_dtype(len(matrix)), copy=True).contiguous()
    if not is_finite(lower):
        raise UserError(f"{name}: {NOT_FINITE}")
    diagonal = symmetrise_(lower).diagonal().clone()
    dead = diagonal == 0
    if (diagonal < -_ROUNDING * diagonal.abs().sum()).any():
        raise UserError(f"{name}: the second moment of its inputs has a negative diagonal; recompute it")
    diagonal.clamp_(min=0)
    mean = diagonal[~dead].mean().item() if not dead.all() else 1.0
    diagonal[dead] = mean
    tried = damping
    for attempt in range(_TRIES):
        if attempt:
            mirror_(lower)  # an attempt overwrites the lower half alone
        lower.diagonal().copy_(diagonal + tried * mean)
        if cholesky_(lower):
            if tried != damping:
                log.warning("%s: no Cholesky factor at damping %g; used %g", name, damping, tried)
            return lower.tril_(), tried
        tried = max(tried * 10, _FIRST_DAMPING)
    log.warning(
        "%s: no Cholesky factor even at damping %g; rounded without feedback: give more calibration samples",
        name,
        tried / 10,
    )
    return (diagonal + max(damping, _FIRST_DAMPING) * mean).sqrt().diag(), math.inf
