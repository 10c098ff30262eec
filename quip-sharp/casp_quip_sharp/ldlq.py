"""LDLQ: rounding groups of 8 columns from last to first, each error made good by the groups still to come.

Tseng et al. 2024, arXiv 2402.04396, section 4.1 (BlockLDLQ). With `H = A D A^T`, A unit lower triangular in blocks of 8
and D block-diagonal, `tr(E H E^T)` of an error E = W - W^ is the sum over the groups k of `tr(N_k D_k N_k^T)`, where
`N_k = E_k + sum_{j>k} E_j A_jk`. So the value wanted for group k, once those after it stand, is
`W_k + sum_{j>k} E_j A_jk`; the codebook's nearest point to it is taken, and N_k is what that rounding leaves.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from casp.moments import damped_cholesky
from casp_quip_sharp.codebooks import GROUP, STAGES
from casp_quip_sharp.search import quantize_vectors

_BLOCK = 128  # columns between two updates of all that follow: few large matrix products instead of many small ones


@dataclass(frozen=True)
class Factors:
    """Block LDL of a damped Hessian (n, n): feedback is A, (n, n); diagonal the blocks of D, (n / 8, 8, 8); float32.

    hessian: the damped H itself.
    """

    hessian: Tensor
    feedback: Tensor
    diagonal: Tensor


def block_ldl(hessian: Tensor, damping: float, name: str = "weight") -> Factors:
    """Factor `hessian` + damping * mean(diagonal); n must be a multiple of 8. UserError as `damped_cholesky`."""
    lower, _ = damped_cholesky(hessian, damping, name)
    groups = len(lower) // GROUP
    corners = torch.stack([lower[i : i + GROUP, i : i + GROUP] for i in range(0, len(lower), GROUP)])
    inverse = torch.linalg.solve_triangular(corners, torch.eye(GROUP).to(corners).expand_as(corners), upper=False)
    feedback = torch.einsum("igj,gjk->igk", lower.view(len(lower), groups, GROUP), inverse).reshape(lower.shape)
    diagonal = corners @ corners.transpose(1, 2)
    damped = ((hessian + hessian.T) / 2).float()
    damped.diagonal().copy_(lower.square().sum(1))  # damping has moved nothing else; cheaper than the whole product
    return Factors(damped, feedback.float(), diagonal.float())


@dataclass(frozen=True)
class Rounded:
    """Codes of every stage, each (out, in / 8), and the points that they stand for, (out, in) float32."""

    codes: list[Tensor]
    points: Tensor


def ldlq(target: Tensor, factors: Factors, bits: int) -> Rounded:
    """Round `target` (out, in) float32, in units of the codebook, from its last columns to its first."""
    rows, columns = target.shape
    groups = columns // GROUP
    codes = [torch.empty(rows, groups, dtype=stage.dtype, device=target.device) for stage in STAGES[bits]]
    error = torch.zeros_like(target)
    pending = target.clone()  # the target plus the feedback of all blocks that are done
    for end in range(columns, 0, -_BLOCK):
        start = max(end - _BLOCK, 0)
        for first in range(end - GROUP, start - 1, -GROUP):
            last = first + GROUP
            wanted = pending[:, first:last] + error[:, last:end] @ factors.feedback[last:end, first:last]
            found, points = quantize_vectors(wanted, bits)
            error[:, first:last] = target[:, first:last] - points
            for stage, code in zip(codes, found, strict=True):
                stage[:, first // GROUP] = code
        pending[:, :start] += error[:, start:end] @ factors.feedback[start:end, :start]
    return Rounded(codes, target - error)


def descend(target: Tensor, factors: Factors, rounded: Rounded, bits: int) -> Rounded:
    """One sweep of coordinate descent: each group is rounded again, given all others; no row's cost rises.

    With G = E H, the best real value for group k is `W^_k + G_k H_kk^-1`; the point nearest to it is taken where that
    lowers the cost (nearest is meant without regard to H_kk, so it need not).
    """
    columns = target.shape[1]
    hessian = factors.hessian
    codes = [stage.clone() for stage in rounded.codes]
    points = rounded.points.clone()
    gradient = (target - points) @ hessian
    blocks = torch.stack([hessian[i : i + GROUP, i : i + GROUP] for i in range(0, columns, GROUP)])
    inverse = torch.linalg.inv(blocks)
    for end in range(columns, 0, -_BLOCK):
        start = max(end - _BLOCK, 0)
        moves = torch.zeros_like(points[:, start:end])
        for first in range(end - GROUP, start - 1, -GROUP):
            last, k = first + GROUP, first // GROUP
            pull = gradient[:, first:last] - moves[:, last - start :] @ hessian[last:end, first:last]
            found, candidate = quantize_vectors(points[:, first:last] + pull @ inverse[k], bits)
            move = candidate - points[:, first:last]
            better = (move * (2 * pull - move @ blocks[k])).sum(1) > 0
            move *= better[:, None]
            moves[:, first - start : last - start] = move
            points[:, first:last] += move
            for stage, code in zip(codes, found, strict=True):
                stage[:, k] = torch.where(better, code, stage[:, k])
        gradient -= moves @ hessian[start:end]
    return Rounded(codes, points)


def weighted_loss(error: Tensor, hessian: Tensor) -> float:
    """`tr(E H E^T)` of an error (out, in)."""
    return ((error @ hessian) * error).sum(dtype=torch.float64).item()
