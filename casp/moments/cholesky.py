"""The Cholesky factor of a second moment, which may be singular or hold inputs that never occur."""

import logging

import torch
from torch import Tensor

from casp.errors import UserError

log = logging.getLogger(__name__)

_FIRST_DAMPING = 1e-8  # where the retries start when the caller asked for no damping at all
_TRIES = 12  # each retry damps ten times more: from 1e-8 that ends at a thousand times the mean diagonal


def damped_cholesky(matrix: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """Cholesky factor of a second moment, damped until it exists.

    ``matrix`` (n, n) is symmetrised and ``damping * mean(diagonal)`` added to its diagonal; when the
    factorisation fails, ten times more, a bounded number of times, with a warning that gives ``name`` (the
    layer) and the damping. An input that never occurs (a zero on the diagonal) gets the mean diagonal, so
    that it stays apart from all others; the mean is over the inputs that do occur.

    Returns the lower factor (n, n) in float64 on the matrix's device, and the damping used. Raises UserError
    for NaN or infinity, for a negative diagonal, and when no damping helps.
    """
    matrix = matrix.to(torch.float64)
    if not torch.isfinite(matrix).all():
        raise UserError(
            f"{name}: the second moment of its inputs holds NaN or infinity; check the model's weights and "
            f"the calibration data, or run in a wider --dtype"
        )
    matrix = (matrix + matrix.T) / 2
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean().item() if not dead.all() else 1.0
    if (diagonal < 0).any():
        raise UserError(f"{name}: the second moment of its inputs has a negative diagonal; recompute it")
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
    raise UserError(
        f"{name}: the second moment of its inputs has no Cholesky factor even at damping {tried / 10:g}; "
        f"give more calibration samples"
    )
