"""The decomposition of stage 1: the best factors of a given rank under what a layer meets.

An error ``D`` of a weight ``W`` (out, in) costs ``tr(M D H D^T)``: ``H`` is the second moment of the inputs and
``M`` that of the directions in which an error of the outputs shows. Without either it is the plain squared
error; with ``H`` alone it is the whitening of CASP (Gholami et al., CVPR 2025, arXiv 2503.05936) and SVD-LLM
(arXiv 2403.07378); with both it is the two-sided whitening that this stage adds. In all three the optimum is
the truncated SVD of ``A^T W B`` with ``M = A A^T`` and ``H = B B^T``, both sides undone afterwards.
"""

import math

import torch
from torch import Tensor

from casp.errors import UserError
from casp.moments import damped_cholesky


def rank_for(keep_ratio: float, out_features: int, in_features: int) -> int | None:
    """Rank at which the two factors hold ``keep_ratio`` of the weights: ``floor(rho m n / (m + n))``, at least 1.

    None when that rank saves nothing, ``r (m + n) >= m n``: the layer then stays dense. Raises UserError for
    a ratio outside (0, 1].
    """
    if not 0 < keep_ratio <= 1:
        raise UserError(f"keep-ratio {keep_ratio:g} is outside (0, 1]; give the share of weights to keep, as 0.25")
    weights, per_rank = out_features * in_features, out_features + in_features
    rank = max(1, math.floor(keep_ratio * weights / per_rank))
    return rank if rank * per_rank < weights else None


def factor(
    weight: Tensor,
    rank: int,
    hessian: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = 0.0,
    name: str = "weight",
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors ``up @ down`` of ``weight`` that minimise ``tr(M D H D^T)``, ``D = W - up @ down``, in closed form.

    weight: (out, in); hessian: ``H`` (in, in) and output_moment: ``M`` (out, out), symmetric and positive
    semi-definite, the identity when None; damping: added to the diagonals of both, in units of their means (a
    singular moment needs some: `damped_cholesky` finds out and says so under ``name``).

    Returns up (out, rank), down (rank, in), each holding the square root of the singular values, so that both
    have entries of one size (kind to half precision and to quantizers), and all singular values of the
    whitened weight (min(out, in),) in falling order; all in float64. The squares of those from ``rank`` on, the
    discarded ones, sum to the minimum under the damped moments, the squares of all to the cost of dropping W.
    Raises UserError when a moment or the weight holds NaN or infinity.
    """
    whitened = weight.to(torch.float64)
    if not torch.isfinite(whitened).all():
        raise UserError(f"{name} holds NaN or infinity; download or write the checkpoint again")
    right = left = None
    if hessian is not None:
        right, _ = damped_cholesky(hessian, damping, f"{name} (inputs)")
        whitened = whitened @ right
    if output_moment is not None:
        left, _ = damped_cholesky(output_moment, damping, f"{name} (outputs)")
        whitened = left.T @ whitened
    u, s, vh = torch.linalg.svd(whitened, full_matrices=False)
    balance = s[:rank].sqrt()
    up, down = u[:, :rank] * balance, balance[:, None] * vh[:rank]
    if left is not None:
        up = torch.linalg.solve_triangular(left.T, up, upper=True)
    if right is not None:
        down = torch.linalg.solve_triangular(right, down, upper=False, left=False)
    return up, down, s
