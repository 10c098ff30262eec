"""LDLQ: rounding groups of columns from last to first, each error made good by the groups still to come.

Tseng et al. 2024, arXiv 2402.04396, section 4.1 (BlockLDLQ). With `H = A D A^T`, A unit lower triangular in blocks of g
columns and D block-diagonal, `tr(E H E^T)` of an error E = W - W^ is the sum over the groups k of `tr(N_k D_k N_k^T)`,
where `N_k = E_k + sum_{j>k} E_j A_jk`. So the value wanted for group k, once those after it stand, is
`W_k + sum_{j>k} E_j A_jk`; the codebook's nearest point to it is taken, and N_k is what that rounding leaves. A group
is 8 columns for the lattice E8 and one column for a trellis.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from casp.moments import damped_cholesky
from casp.moments.symmetric import symmetrise_
from casp_quip_sharp.codebook import Codebook

_BLOCK = 128  # columns between two updates of all that follow: few large matrix products instead of many small ones


@dataclass(frozen=True)
class Factors:
    """Block LDL of a damped Hessian (n, n): feedback is A, (n, n) float32; hessian: the damped H itself, float32."""

    hessian: Tensor
    feedback: Tensor


def _corners(matrix: Tensor, group: int) -> Tensor:
    """The blocks on the diagonal of `matrix` (n, n): (n / group, group, group)."""
    blocks = matrix.unflatten(1, (-1, group)).unflatten(0, (-1, group))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def block_ldl(hessian: Tensor, damping: float, group: int, name: str = "weight") -> Factors:
    """Factor `hessian` + damping * mean(diagonal) in blocks of `group`, which divides n.

    A float32 `hessian` is taken over: it becomes the damped one. UserError as `damped_cholesky`.
    """
    lower, used = damped_cholesky(hessian, damping, name)
    squares = torch.linalg.vector_norm(lower, dim=1).square()
    corners = _corners(lower, group)
    if group == 1:
        feedback = lower.float().div_(corners[:, 0, 0])
    else:
        inverse = torch.linalg.solve_triangular(corners, torch.eye(group).to(corners).expand_as(corners), upper=False)
        feedback = torch.einsum("igj,gjk->igk", lower.unflatten(1, (-1, group)), inverse).reshape(lower.shape).float()
    del lower
    # Without a factor of its own the Hessian counts by its diagonal alone, in the sweeps as in the feedback.
    damped = symmetrise_(hessian.float()) if used < math.inf else torch.zeros_like(feedback)
    damped.diagonal().copy_(squares)  # damping has moved nothing else; cheaper than the whole product
    return Factors(damped, feedback)


@dataclass(frozen=True)
class Rounded:
    """Codes, tensors (out, in / group), and the points that they stand for, (out, in) float32."""

    codes: list[Tensor]
    points: Tensor


def ldlq(target: Tensor, factors: Factors, codebook: Codebook) -> Rounded:
    """Round `target` (out, in) float32, in units of the codebook, from its last columns to its first."""
    (rows, columns), group = target.shape, codebook.group
    codes = [torch.empty(rows, columns // group, dtype=dtype, device=target.device) for dtype in codebook.code_dtypes()]
    points = torch.empty_like(target)
    pending = target.clone()  # the target plus the feedback of all blocks that are done
    for end in range(columns, 0, -_BLOCK):
        start = max(end - _BLOCK, 0)
        block, feedback = target[:, start:end], factors.feedback[start:end]
        found, points[:, start:end] = codebook.round_block(pending[:, start:end], block, feedback[:, start:end])
        for stage, code in zip(codes, found, strict=True):
            stage[:, start // group : end // group] = code
        pending[:, :start].addmm_(block - points[:, start:end], feedback[:, :start])
    return Rounded(codes, points)


def descend(gradient: Tensor, factors: Factors, rounded: Rounded, codebook: Codebook) -> tuple[Rounded, Tensor]:
    """One sweep of coordinate descent: each group is rounded again, given all others; no row's cost rises.

    gradient: G = E H of what `rounded` leaves, (out, in); returned with what the sweep made of it. The best real value
    for group k is `W^_k + G_k H_kk^-1`; the point nearest to it is taken where that lowers the cost (nearest is meant
    without regard to H_kk, so it need not).
    """
    hessian, columns, group = factors.hessian, rounded.points.shape[1], codebook.group
    codes = [stage.clone() for stage in rounded.codes]
    points, gradient = rounded.points.clone(), gradient.clone()
    corners = _corners(hessian, group)
    inverse = corners.reciprocal() if group == 1 else torch.linalg.inv(corners)
    for end in range(columns, 0, -_BLOCK):
        start = max(end - _BLOCK, 0)
        block, groups = slice(start, end), slice(start // group, end // group)
        old = [stage[:, groups] for stage in codes]
        found, moves = codebook.descend_block(
            gradient[:, block], hessian[block, block], inverse[groups], old, points[:, block]
        )
        points[:, block] += moves
        for stage, code in zip(codes, found, strict=True):
            stage[:, groups] = code
        gradient.addmm_(moves, hessian[block], alpha=-1)
    return Rounded(codes, points), gradient
