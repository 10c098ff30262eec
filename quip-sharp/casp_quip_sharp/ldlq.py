"""LDLQ: rounding groups of 8 columns from last to first, each error made good by the groups still to come.

Tseng et al. 2024, arXiv 2402.04396, section 4.1 (BlockLDLQ). With `H = A D A^T`, A unit lower triangular in blocks of 8
and D block-diagonal, `tr(E H E^T)` of an error E = W - W^ is the sum over the groups k of `tr(N_k D_k N_k^T)`, where
`N_k = E_k + sum_{j>k} E_j A_jk`. So the value wanted for group k, once those after it stand, is
`W_k + sum_{j>k} E_j A_jk`; the codebook's nearest point to it is taken, and N_k is what that rounding leaves.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from casp.moments import damped_cholesky
from casp_quip_sharp.codebooks import GROUP, STAGES
from casp_quip_sharp.ldlq_compiled import descend_block_compiled, round_block_compiled
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
    lower, used = damped_cholesky(hessian, damping, name)
    groups = len(lower) // GROUP
    corners = torch.stack([lower[i : i + GROUP, i : i + GROUP] for i in range(0, len(lower), GROUP)])
    inverse = torch.linalg.solve_triangular(corners, torch.eye(GROUP).to(corners).expand_as(corners), upper=False)
    feedback = torch.einsum("igj,gjk->igk", lower.view(len(lower), groups, GROUP), inverse).reshape(lower.shape)
    diagonal = corners @ corners.transpose(1, 2)
    # Without a factor of its own the Hessian counts by its diagonal alone, in the sweeps as in the feedback.
    damped = ((hessian + hessian.T) / 2).float() if used < math.inf else torch.zeros_like(lower, dtype=torch.float32)
    damped.diagonal().copy_(lower.square().sum(1))  # damping has moved nothing else; cheaper than the whole product
    return Factors(damped, feedback.float(), diagonal.float())


@dataclass(frozen=True)
class Rounded:
    """Codes of every stage, each (out, in / 8), and the points that they stand for, (out, in) float32."""

    codes: list[Tensor]
    points: Tensor


def round_block_reference(wanted: Tensor, target: Tensor, feedback: Tensor, bits: int) -> tuple[list[Tensor], Tensor]:
    """Codes (rows, width / 8) of every stage and points (rows, width) of a block of columns, last group first.

    wanted, target: (rows, width), with and without the feedback of the blocks that are done; feedback: A within the
    block, (width, width).
    """
    width = target.shape[1]
    error, codes = torch.zeros_like(target), []
    for first in range(width - GROUP, -1, -GROUP):
        last = first + GROUP
        found, points = quantize_vectors(wanted[:, first:last] + error[:, last:] @ feedback[last:, first:last], bits)
        error[:, first:last] = target[:, first:last] - points
        codes.append(found)
    return [torch.stack(stage[::-1], 1) for stage in zip(*codes, strict=True)], target - error


def descend_block_reference(
    gradient: Tensor, hessian: Tensor, inverse: Tensor, codes: list[Tensor], points: Tensor, bits: int
) -> tuple[list[Tensor], Tensor]:
    """New codes of a block of columns and how far its points move, (rows, width); last group first.

    gradient: E H of the block, (rows, width); hessian: (width, width); inverse: of its groups of 8, (width / 8, 8, 8);
    codes and points: as they are, not changed.
    """
    codes, moves = [stage.clone() for stage in codes], torch.zeros_like(points)
    for first in range(points.shape[1] - GROUP, -1, -GROUP):
        last, k = first + GROUP, first // GROUP
        pull = gradient[:, first:last] - moves[:, last:] @ hessian[last:, first:last]
        found, candidate = quantize_vectors(points[:, first:last] + pull @ inverse[k], bits)
        move = candidate - points[:, first:last]
        better = (move * (2 * pull - move @ hessian[first:last, first:last])).sum(1) > 0
        moves[:, first:last] = move * better[:, None]
        for stage, code in zip(codes, found, strict=True):
            stage[:, k] = torch.where(better, code, stage[:, k])
    return codes, moves


def round_block(wanted: Tensor, target: Tensor, feedback: Tensor, bits: int) -> tuple[list[Tensor], Tensor]:
    """As `round_block_reference`; compiled on a CPU."""
    inner = round_block_compiled if target.device.type == "cpu" else round_block_reference
    return inner(wanted, target, feedback, bits)


def descend_block(
    gradient: Tensor, hessian: Tensor, inverse: Tensor, codes: list[Tensor], points: Tensor, bits: int
) -> tuple[list[Tensor], Tensor]:
    """As `descend_block_reference`; compiled on a CPU."""
    inner = descend_block_compiled if points.device.type == "cpu" else descend_block_reference
    return inner(gradient, hessian, inverse, codes, points, bits)


def ldlq(target: Tensor, factors: Factors, bits: int) -> Rounded:
    """Round `target` (out, in) float32, in units of the codebook, from its last columns to its first."""
    rows, columns = target.shape
    codes = [torch.empty(rows, columns // GROUP, dtype=s.dtype, device=target.device) for s in STAGES[bits]]
    points = torch.empty_like(target)
    pending = target.clone()  # the target plus the feedback of all blocks that are done
    for end in range(columns, 0, -_BLOCK):
        start = max(end - _BLOCK, 0)
        block, feedback = target[:, start:end], factors.feedback[start:end]
        found, points[:, start:end] = round_block(pending[:, start:end], block, feedback[:, start:end], bits)
        for stage, code in zip(codes, found, strict=True):
            stage[:, start // GROUP : end // GROUP] = code
        pending[:, :start].addmm_(block - points[:, start:end], feedback[:, :start])
    return Rounded(codes, points)


def descend(gradient: Tensor, factors: Factors, rounded: Rounded, bits: int) -> tuple[Rounded, Tensor]:
    """One sweep of coordinate descent: each group is rounded again, given all others; no row's cost rises.

    gradient: G = E H of what `rounded` leaves, (out, in); returned with what the sweep made of it. The best real value
    for group k is `W^_k + G_k H_kk^-1`; the point nearest to it is taken where that lowers the cost (nearest is meant
    without regard to H_kk, so it need not).
    """
    hessian, columns = factors.hessian, rounded.points.shape[1]
    codes = [stage.clone() for stage in rounded.codes]
    points, gradient = rounded.points.clone(), gradient.clone()
    corners = torch.stack([hessian[i : i + GROUP, i : i + GROUP] for i in range(0, columns, GROUP)])
    inverse = torch.linalg.inv(corners)
    for end in range(columns, 0, -_BLOCK):
        start = max(end - _BLOCK, 0)
        block, groups = slice(start, end), slice(start // GROUP, end // GROUP)
        old = [stage[:, groups] for stage in codes]
        found, moves = descend_block(
            gradient[:, block], hessian[block, block], inverse[groups], old, points[:, block], bits
        )
        points[:, block] += moves
        for stage, code in zip(codes, found, strict=True):
            stage[:, groups] = code
        gradient.addmm_(moves, hessian[block], alpha=-1)
    return Rounded(codes, points), gradient
