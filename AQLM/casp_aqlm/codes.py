"""The codes of a matrix under its second moment, for given codebooks: a first rounding, then coordinate descent.

The published search (arXiv 2401.06118, section 3.2) decodes the whole matrix and multiplies its error by H for every
group and codebook; here the product of error and H is kept, and a group that changes adds its move times its rows of H.
"""

import torch
from torch import Tensor

from casp_aqlm.factors import Factors
from casp_aqlm.linear import decode
from casp_aqlm.nearest import Search

_BLOCK = 16  # groups between two updates of the whole gradient: few large products instead of many small ones


def round_with_feedback(target: Tensor, codebooks: Tensor, factors: Factors, search: Search) -> Tensor:
    """Codes (rows, groups, M) of `target` (rows, n), each group made to repair what those after it have done.

    codebooks: (M, entries, g). Groups are rounded from the last to the first, each to the sum nearest in its metric.
    """
    groups = target.shape[1] // factors.group
    codes = torch.empty(len(target), groups, len(codebooks), dtype=torch.int64, device=target.device)
    wanted = target.clone()
    for k in reversed(range(groups)):
        at, metric = factors.columns(k), factors.rounding[k]
        codes[:, k] = search.sums(wanted[:, at] @ metric, codebooks @ metric)
        error = target[:, at] - decode(codes[:, k : k + 1], codebooks)
        wanted[:, : at.start].addmm_(error, factors.feedback[at, : at.start])
    return codes


def descend(target: Tensor, codes: Tensor, codebooks: Tensor, factors: Factors, search: Search) -> Tensor:
    """One sweep over the groups, last to first: each takes its best codes given all others; no row's loss rises.

    The best real value of group k is `W^_k + G_k H_kk^-1` with the gradient G = (target - W^) H; the sum nearest to it
    in the metric of H_kk is taken. Returns the new codes.
    """
    codes, points = codes.clone(), decode(codes, codebooks)
    gradient = (target - points) @ factors.hessian
    for last in range(codes.shape[1], 0, -_BLOCK):
        first = max(last - _BLOCK, 0)
        block = slice(first * factors.group, last * factors.group)
        within, moved = factors.hessian[block, block], points[:, block].clone()
        slope = gradient[:, block].clone()
        for k in reversed(range(first, last)):
            at, metric = factors.columns(k), factors.moving[k]
            here = slice(at.start - block.start, at.stop - block.start)
            pull, old = slope[:, here], points[:, at]
            wanted = (old + pull @ factors.inverse[k]) @ metric
            found = search.sums(wanted, codebooks @ metric, codes[:, k])
            move = decode(found[:, None], codebooks) - old
            gain = (move * (2 * pull - move @ factors.hessian[at, at])).sum(1, keepdim=True)
            move = torch.where(gain > 0, move, 0)
            codes[:, k] = torch.where(gain > 0, found, codes[:, k])
            points[:, at] += move
            slope -= move @ within[here]
        gradient.addmm_(points[:, block] - moved, factors.hessian[block], alpha=-1)
    return codes
