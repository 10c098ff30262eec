"""A damped second moment, cut into the groups of columns that are rounded together.

With `H = A D A^T`, A unit lower triangular in blocks of g and D block-diagonal, `tr(E H E^T)` of an error E is the sum
over the groups k of `tr(N_k D_k N_k^T)`, `N_k = E_k + sum_{j > k} E_j A_jk`: rounded from the last group to the first,
each group can make good what those after it did (GPTQ, arXiv 2210.17323; LDLQ, arXiv 2307.13304).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from casp.moments import damped_cholesky


def _corners(matrix: Tensor, group: int) -> Tensor:
    """Blocks (n / group, group, group) on the diagonal of `matrix` (n, n)."""
    return torch.stack([matrix[i : i + group, i : i + group] for i in range(0, len(matrix), group)])


def order_of_activation(hessian: Tensor, group: int) -> Tensor:
    """The groups of `hessian` (n, n) by what their inputs carry, the least first: (n / group,) int64.

    Rounding goes from the last group to the first, so that the heaviest errors are made while most others can still
    repair them (act-order in GPTQ). What is stored stays in the order of the columns: this costs nothing.
    """
    return hessian.diagonal().view(-1, group).sum(1).argsort(stable=True)


@dataclass(frozen=True)
class Factors:
    """What the search needs of a damped Hessian H (n, n), groups of g columns; all float32.

    feedback: A (n, n); rounding (n / g, g, g): lower Cholesky factors of D's blocks, the metric that a group is rounded
    in while those before it are open; moving (n / g, g, g): those of H's blocks, its metric while all others stand;
    inverse (n / g, g, g): of H's blocks.
    """

    hessian: Tensor
    group: int
    feedback: Tensor
    rounding: Tensor
    moving: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, hessian: Tensor, group: int, damping: float, name: str = "weight") -> "Factors":
        """Factor `hessian` + damping * mean(diagonal); n a multiple of group. UserError as `damped_cholesky`."""
        lower, _ = damped_cholesky(hessian, damping, name)
        size = len(lower)
        rounding = _corners(lower, group)
        unit = torch.linalg.solve_triangular(rounding, torch.eye(group).to(rounding).expand_as(rounding), upper=False)
        feedback = torch.einsum("igj,gjk->igk", lower.view(size, size // group, group), unit).reshape(size, size)
        damped = ((hessian + hessian.T) / 2).to(lower)
        damped.diagonal().copy_(lower.square().sum(1))  # damping has moved nothing else
        blocks = _corners(damped, group)
        moving = torch.linalg.cholesky(blocks)
        parts = (feedback, rounding, moving, torch.cholesky_inverse(moving))
        return cls(damped.float(), group, *(part.float() for part in parts))

    def columns(self, group: int) -> slice:
        """The columns of a group."""
        return slice(group * self.group, (group + 1) * self.group)


def weighted_loss(error: Tensor, hessian: Tensor) -> Tensor:
    """`e H e^T` of every row e of `error` (rows, n): (rows,)."""
    return ((error @ hessian) * error).sum(1)
