"""Improving a finished GPTQ result under the same objective: scales in closed form, codes by coordinate descent.

GPTQ rounds each column once, knowing only the columns before it, and clips what falls off the grid. Once all
codes stand, `tr(D H D^T)` is a plain quadratic: the scales of a row have a least-squares optimum, and each code
has a best value given all others.
"""

import torch
from torch import Tensor

from casp_gptq.grid import stored_scales, to_codes

_BLOCK = 64  # columns between two updates of the whole gradient


def _spread(per_group: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """Rows of `per_group` (groups, out) repeated for every column of their group: (in, out)."""
    widths = torch.tensor([last - first for first, last in bounds], device=per_group.device)
    return per_group.repeat_interleave(widths, 0)


def _cost(error: Tensor, hessian: Tensor) -> Tensor:
    """`d^T H d` for every output, (out,), of an error (in, out)."""
    return (error * (hessian @ error)).sum(0)


def best_scales(
    target: Tensor, hessian: Tensor, levels: Tensor, scales: Tensor, bounds: list[tuple[int, int]]
) -> Tensor:
    """The scales (groups, out) that minimise every row's cost for fixed levels = codes - zeros (in, out).

    A least-squares problem of as many unknowns as a row has groups. A row keeps its old `scales` where the
    new ones, rounded to float16, are no better (levels all zero, a negative scale, a singular system).
    """
    groups = len(bounds)
    normal = target.new_empty(target.shape[1], groups, groups)
    right = target.new_empty(target.shape[1], groups)
    pulled = hessian @ target
    for g, (first, last) in enumerate(bounds):
        image = hessian[:, first:last] @ levels[first:last]
        right[:, g] = (levels[first:last] * pulled[first:last]).sum(0)
        for k, (start, end) in enumerate(bounds):
            normal[:, k, g] = (levels[start:end] * image[start:end]).sum(0)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + torch.finfo(target.dtype).tiny
    solved, _ = torch.linalg.solve_ex(normal, right)
    solved = stored_scales(torch.where(torch.isfinite(solved) & (solved > 0), solved, scales.T)).T
    before = _cost(target - _spread(scales, bounds) * levels, hessian)
    after = _cost(target - _spread(solved, bounds) * levels, hessian)
    return torch.where(after < before, solved, scales)


def descend(target: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """One sweep over the columns: each code (in, out) becomes the best one given all others.

    scales and zeros are (in, out), spread over the columns. The cost of no row can rise.
    """
    codes = codes.clone()
    diagonal = hessian.diagonal()
    gradient = hessian @ (target - scales * (codes - zeros))
    for start in range(0, len(target), _BLOCK):
        end = min(start + _BLOCK, len(target))
        moves = torch.zeros_like(target[start:end])
        for j in range(start, end):
            pull = gradient[j] - hessian[j, start:j] @ moves[: j - start]
            current = scales[j] * (codes[j] - zeros[j])
            best = to_codes(current + pull / diagonal[j], scales[j], zeros[j], bits)
            moves[j - start] = scales[j] * (best - codes[j])
            codes[j] = best
        gradient -= hessian[:, start:end] @ moves
    return codes


def refine(
    target: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bounds: list[tuple[int, int]],
    bits: int,
    damping: float,
    sweeps: int,
) -> tuple[Tensor, Tensor]:
    """Alternate `best_scales` and `descend` `sweeps` times, under the damped Hessian that GPTQ used.

    target, codes: (in, out) float32; scales, zeros: (groups, out); hessian: (in, in); bounds: columns of each
    group. Zeros stay. Returns codes and scales of no higher cost.
    """
    hessian = hessian.float()
    diagonal = hessian.diagonal()
    occurring = diagonal > 0
    mean = diagonal[occurring].mean() if occurring.any() else diagonal.new_ones(())
    damped = hessian + torch.diag(torch.where(occurring, damping * mean, mean))
    for _ in range(sweeps):
        scales = best_scales(target, damped, codes - _spread(zeros, bounds), scales, bounds)
        codes = descend(target, damped, codes, _spread(scales, bounds), _spread(zeros, bounds), bits)
    return codes, scales
