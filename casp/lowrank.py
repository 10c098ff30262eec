"""Low-rank factors of a weight: the best of every rank under what the layer meets, and how they are quantized together.

An error ``D`` of a weight ``W`` (out, in) costs ``tr(M D H D^T)``: ``H`` is the second moment of the inputs and
``M`` that of the directions in which an error of the outputs shows. Without either it is the plain squared
error; with ``H`` alone it is the whitening of CASP (Gholami et al., CVPR 2025, arXiv 2503.05936) and SVD-LLM
(arXiv 2403.07378); with both it is a two-sided whitening. In all three the optimum is the truncated SVD of
``A^T W B`` with ``M = A A^T`` and ``H = B B^T``, both sides undone afterwards.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from casp.errors import UserError
from casp.moments import damped_, damped_cholesky

WHITENING_DAMPING = 0.001
"""Of both moments where a plan's low-rank linears are factored, in units of their mean diagonals."""

LOW_RANK_ROLES = frozenset({"q", "k"})
"""Roles that may become low-rank: errors of queries and keys only reach the model through the attention map. (With all
roles free, the plan of demo-llama predicted more and measured less: structured errors in what goes straight into the
residual stream cost more than the expansion says.)"""


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


@dataclass(frozen=True)
class Decomposition:
    """One whitened SVD, from which the best factors of every rank follow.

    up: (out, n) and down: (n, in) float64, n = min(out, in): unwhitened, each with the square root of the singular
    values in it, so that both have entries of one size (kind to half precision and to quantizers); singular: (n,)
    float64, all singular values of the whitened weight in falling order.
    """

    up: Tensor
    down: Tensor
    singular: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Up (out, rank) and down (rank, in): their product is the best of this rank."""
        return self.up[:, :rank], self.down[:rank]

    def lost(self, rank: int) -> float:
        """``tr(M D H D^T)`` of what `factors(rank)` leaves out, under the damped moments."""
        return self.singular[rank:].square().sum().item()


def decompose(
    weight: Tensor,
    hessian: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = 0.0,
    name: str = "weight",
) -> Decomposition:
    """The SVD of ``weight`` (out, in) whitened on both sides, in float64.

    By the eigenvectors of the whitened weight's product with its own transpose, in less than half the time of an SVD.
    What the first r of them span is projected onto exactly, so no rank's factors lose by it; singular values are the
    lengths of the projections and below 1e-8 of the largest no more than a bound.

    hessian: ``H`` (in, in) and output_moment: ``M`` (out, out), symmetric and positive semi-definite, the identity when
    None; damping: added to the diagonals of both, in units of their means (a singular moment needs some:
    `damped_cholesky` finds out and says so under ``name``). Raises UserError when a moment or the weight holds NaN or
    infinity.
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
    up, down, singular = _balanced(whitened)
    if left is not None:
        up = torch.linalg.solve_triangular(left.T, up, upper=True)
    if right is not None:
        down = torch.linalg.solve_triangular(right, down, upper=False, left=False)
    return Decomposition(up, down, singular)


@dataclass(frozen=True)
class Spectrum:
    """squares: (n,) float64, of all singular values of a whitened weight in falling order."""

    squares: Tensor

    def lost(self, rank: int) -> float:
        """As `Decomposition.lost`."""
        return self.squares[rank:].sum().item()


def leading(
    weight: Tensor, hessian: Tensor, output_moment: Tensor, rank: int, damping: float = 0.0, name: str = "weight"
) -> tuple[Tensor, Spectrum]:
    """What pricing needs of `decompose`: the first `rank` rows of its `down`, and what every rank loses.

    With ``M = A A^T`` and H damped, ``(A^T W) H (A^T W)^T = U diag(s^2) U^T`` and ``down = s^-1/2 U^T A^T W``: where W
    is no taller than wide, H need neither be factored nor undone. float64.
    """
    rows, columns = weight.shape
    if rows > columns:
        found = decompose(weight, hessian, output_moment, damping, name)
        return found.down[:rank], Spectrum(found.singular.square())
    weight = weight.to(torch.float64)
    if not torch.isfinite(weight).all():
        raise UserError(f"{name} holds NaN or infinity; download or write the checkpoint again")
    left, _ = damped_cholesky(output_moment, damping, f"{name} (outputs)")
    seen = left.T @ weight
    squares, basis = torch.linalg.eigh(seen @ damped_(hessian.to(torch.float64, copy=True), damping) @ seen.T)
    squares, basis = squares.flip(0).clamp_min(0), basis.flip(1)
    balance = squares[:rank].pow(0.25).clamp_min(torch.finfo(torch.float64).tiny)
    return (basis[:, :rank] / balance).T @ seen, Spectrum(squares)


def _balanced(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U sqrt(s)``, ``sqrt(s) V^T`` and s of ``matrix`` (m, n) = ``U diag(s) V^T``, s falling."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    _, basis = torch.linalg.eigh(wide @ wide.T)
    onto = basis.T @ wide
    singular, order = torch.linalg.vector_norm(onto, dim=1).sort(descending=True)
    balance = singular.sqrt()
    near, far = basis[:, order] * balance, onto[order] / balance.clamp_min(torch.finfo(balance.dtype).tiny)[:, None]
    return (near, far, singular) if wide is matrix else (far.T, near.T, singular)


def factor(
    weight: Tensor,
    rank: int,
    hessian: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = 0.0,
    name: str = "weight",
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors ``up @ down`` of ``weight`` that minimise ``tr(M D H D^T)``, ``D = W - up @ down``, in closed form.

    Arguments and errors are those of `decompose`. Returns up (out, rank), down (rank, in) and all singular values of
    the whitened weight (min(out, in),) in falling order; all in float64. The squares of those from ``rank`` on, the
    discarded ones, sum to the minimum under the damped moments, the squares of all to the cost of dropping W.
    """
    found = decompose(weight, hessian, output_moment, damping, name)
    return *found.factors(rank), found.singular


_REFIT_DAMPING = 1e-9  # the rounded rows of `down` are independent but for accidents; `damped_cholesky` catches those


def refit(weight: Tensor, down: Tensor, hessian: Tensor, name: str = "weight") -> Tensor:
    """The best ``up`` (out, rank) for a given ``down`` (rank, in): minimises ``tr(M (W - up down) H (W - up down)^T)``.

    ``up = W H down^T (down H down^T)^-1``, whatever the output moment M: where M is regular it cancels. float64.
    """
    weight, down, hessian = (tensor.to(torch.float64) for tensor in (weight, down, hessian))
    seen = down @ hessian
    return best_up(weight @ seen.T, seen @ down.T, name)


def best_up(crossed: Tensor, inner: Tensor, name: str = "weight") -> Tensor:
    """`refit` from ``W H down^T`` (out, rank) and ``down H down^T`` (rank, rank), float64."""
    lower, _ = damped_cholesky(inner, _REFIT_DAMPING, f"{name} (rounded down)")
    return torch.cholesky_solve(crossed.T, lower).T


Rounder = Callable[[Tensor, Tensor, str], tuple[dict[str, Tensor], Tensor]]
"""(weight (out, in) float32, moment of its input (in, in) float32, "down" or "up") -> (what is stored, the weight that
this stands for, (out, in))."""


@dataclass(frozen=True)
class RoundedFactors:
    """Of both factors what is stored, what that stands for, what was to be rounded, and under which input moment."""

    stored_down: dict[str, Tensor]
    stored_up: dict[str, Tensor]
    down: Tensor
    up: Tensor
    moment: Tensor
    inner_moment: Tensor
    wanted_down: Tensor
    wanted_up: Tensor

    def dense(self) -> Tensor:
        """``up @ down`` (out, in) in float64."""
        return self.up.to(torch.float64) @ self.down.to(torch.float64)


def round_factors(
    weight: Tensor, down: Tensor, hessian: Tensor, rounder: Rounder, name: str = "weight"
) -> RoundedFactors:
    """Quantize both factors of ``weight`` (out, in), the second knowing what became of the first.

    down: (rank, in), the factor to start from; hessian: (in, in). `down` is rounded under `hessian`; `up` is refitted
    to the rounded `down` in closed form (`refit`), and rounded under the second moment of what that `down` puts out,
    ``down H down^T``. So what rounding does to `down` within the rows' span costs nothing, and `up` is rounded for
    the inputs that it will see.
    """
    stored_down, rounded_down = rounder(down.float(), hessian.float(), "down")
    wanted = refit(weight, rounded_down, hessian, name)
    exact = rounded_down.to(torch.float64)
    inner = exact @ hessian.to(torch.float64) @ exact.T
    stored_up, rounded_up = rounder(wanted.float(), inner.float(), "up")
    return RoundedFactors(stored_down, stored_up, rounded_down, rounded_up, hessian, inner, down, wanted)
