"""Improving a finished GPTQ result under the same objective: scales in closed form, codes by coordinate descent.

GPTQ rounds each column once, knowing only the columns before it, and clips what falls off the grid. Once all
codes stand, `tr(D H D^T)` is a plain quadratic: the scales of a row have a least-squares optimum, and each code
has a best value given all others.
"""

import torch
from torch import Tensor

from casp.moments.symmetric import panels
from casp_gptq.grid import stored_scales

PANEL = 512  # columns between two updates of the whole gradient, which is larger than any cache
_BLOCK = 64  # columns between two updates of the panel's own


def _spread(per_group: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """Rows of `per_group` (groups, out) repeated for every column of their group: (in, out)."""
    widths = torch.tensor([last - first for first, last in bounds], device=per_group.device)
    return per_group.repeat_interleave(widths, 0)


def best_scales(
    hessian: Tensor, levels: Tensor, gradient: Tensor, scales: Tensor, bounds: list[tuple[int, int]]
) -> Tensor:
    """The scales (groups, out) that minimise every row's cost for fixed levels = codes - zeros (in, out).

    gradient: `H (target - scales * levels)`, (in, out). A least-squares problem of as many unknowns as a row has
    groups, solved for the change of the scales: taken from the gradient it keeps its digits even at 8 bits,
    where the error is a millionth of the weight. A row keeps its old `scales` where the new ones, rounded to
    float16, are no better (levels all zero, a negative scale, a singular system).
    """
    groups = len(bounds)
    normal = gradient.new_empty(gradient.shape[1], groups, groups)
    right = gradient.new_empty(gradient.shape[1], groups)
    for g, (first, last) in enumerate(bounds):
        image = hessian[:last, first:last] @ levels[first:last]
        right[:, g] = (levels[first:last] * gradient[first:last]).sum(0)
        for k, (start, end) in enumerate(bounds[: g + 1]):
            normal[:, k, g] = normal[:, g, k] = (levels[start:end] * image[start:end]).sum(0)
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(gradient.dtype).tiny
    change, _ = torch.linalg.solve_ex(normal + torch.diag_embed(ridge[:, None].expand(-1, groups)), right)
    old = scales.T
    solved = old + change
    solved = stored_scales(torch.where(torch.isfinite(solved) & (solved > 0), solved, old))
    change = solved - old
    gain = 2 * (change * right).sum(1) - (change[:, None] @ normal @ change[:, :, None])[:, 0, 0]
    return torch.where(gain[:, None] > 0, solved, old).T.contiguous()


def descend(
    hessian: Tensor, codes: Tensor, gradient: Tensor, scales: Tensor, bits: int, last: bool = False
) -> tuple[Tensor, Tensor]:
    """One sweep over the columns: each code (in, out) becomes the best one given all others.

    gradient: `H (target - scales * (codes - zeros))`; scales (in, out), spread over the columns. The cost of no row
    can rise. Returns codes and gradient as they are afterwards; after the last sweep nobody needs the gradient, which
    is then not kept up to date for the columns already done.
    """
    codes, gradient = codes.clone(), gradient.clone()
    steps = 1 / (hessian.diagonal()[:, None] * scales)  # from a column's gradient to the change of its code
    for panel in panels(len(codes), PANEL):
        moves = torch.zeros_like(codes[panel])
        for mine in panels(len(codes), _BLOCK, panel):
            made = moves[mine.start - panel.start : mine.stop - panel.start]
            # Taken apart into columns beforehand: an index into a tensor costs as much as the sums on a column.
            columns = zip(
                hessian[mine, mine], codes[mine], gradient[mine], steps[mine], scales[mine], made, strict=True
            )
            for j, (row, code, slope, step, scale, move) in enumerate(columns):
                pull = torch.addmv(slope, made[:j].T, row[:j], alpha=-1)
                best = torch.addcmul(code, pull, step).round_().clamp_(0, 2**bits - 1)
                torch.mul(best - code, scale, out=move)
                code.copy_(best)
            near = slice(mine.stop if last else panel.start, panel.stop)
            gradient[near].addmm_(hessian[near, mine], made, alpha=-1)
        for far in (slice(0, 0 if last else panel.start), slice(panel.stop, len(codes))):
            gradient[far].addmm_(hessian[far, panel], moves, alpha=-1)
    return codes, gradient


def refine(
    target: Tensor,
    damped: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bounds: list[tuple[int, int]],
    bits: int,
    sweeps: int,
) -> tuple[Tensor, Tensor]:
    """`best_scales` once, then `sweeps` times `descend`, under the damped Hessian that GPTQ used.

    target, codes: (in, out) float32; damped: (in, in) float32; scales, zeros: (groups, out); bounds: columns of each
    group. Zeros stay. Returns codes and scales of no higher cost. To fit the scales again between the sweeps takes
    one and a half more products of the Hessian with the matrix and gains a four-hundredth of the cost.
    """
    levels = codes - _spread(zeros, bounds)
    gradient = damped @ (target - _spread(scales, bounds) * levels)
    scales = best_scales(damped, levels, gradient, scales, bounds)
    spread_scales = _spread(scales, bounds)
    gradient = damped @ (target - spread_scales * levels)
    for sweep in range(sweeps):
        codes, gradient = descend(damped, codes, gradient, spread_scales, bits, last=sweep == sweeps - 1)
    return codes, scales
