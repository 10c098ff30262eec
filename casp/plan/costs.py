"""What an option of a linear costs the model, predicted from moments, spectra and a few quantized samples.

Let y = W x be a linear's output and g the gradient of the model's summed next-token loss at y. To second order (Fisher)
an error D of W costs `1/2 E[(g^T D x)^2]` nats a token. With G = E[g g^T] and H the second moment of x weighted by
|g|^2 (mean weight 1) that is about `1/2 tr(G D H D^T)` (the Kronecker split of YAQA, arXiv 2505.22988); where the rows
of D are alike, as a rotation makes them, `tr(G) tr(D H D^T) / (2 out)` (GuidedQuant, arXiv 2505.07004). Small errors
are predicted well, large ones too low: the order is what counts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from casp.backend import Backend, Format, Matrix, rounded
from casp.lowrank import WHITENING_DAMPING, Decomposition, decompose, rank_for, refit
from casp.plan.options import LOW_RANK_ROLES, Option, chosen_formats, layouts
from casp.seed import matrix_generator

ANCHORS = (0.1875, 0.5625)
"""Keep ratios at which factors are really quantized; for other ranks costs follow a power of the rank."""
_ANY_SHAPE = (1024, 1024)  # whose formats stand in a run's record for what its words mean


class LinearMoments(Protocol):
    """What the moments of one linear must offer (casp.moments)."""

    energy: float | None
    tokens: int
    losses: int | None
    gradient_moment: Tensor

    def hessian(self, weighting: str) -> Tensor:
        """(in, in) float32 second moment of the input under a weighting of the tokens."""


@dataclass(frozen=True)
class Pricing:
    """How options are priced.

    settings: the backend's knobs of the search, its own for a draft where None; weighting: of the tokens in the moment
    that matrices are rounded and whitened under; damping: of the whitening; rows: most rows of a full-rank matrix that
    are quantized to price it; low_rank: roles that may become low-rank; tuned: formats that fine-tuning can move;
    wanted: words of the backend that choose its formats.
    """

    backend: Backend
    settings: Mapping[str, Any] | None = None
    weighting: str = "attention+gradient"
    damping: float = WHITENING_DAMPING
    rows: int = 128
    low_rank: frozenset[str] = LOW_RANK_ROLES
    tuned: bool = False
    wanted: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def search(self) -> Mapping[str, Any]:
        """The backend's knobs in use."""
        return self.backend.draft if self.settings is None else self.settings

    def record(self) -> dict[str, Any]:
        """What decides the costs, besides the model and its moments: for the fingerprint."""
        return {
            "backend": self.backend.name,
            "search": dict(self.search),
            "token_weights": self.weighting,
            "damping": self.damping,
            "rows": self.rows,
            "low_rank": sorted(self.low_rank),
            "tuned": self.tuned,
            "format": dict(self.wanted),
            "formats": self.formats(_ANY_SHAPE),
            "seed": self.seed,
        }

    def formats(self, shape: tuple[int, int]) -> list[Format]:
        """The formats that a matrix of this shape may take."""
        return chosen_formats(self.backend, *shape, self.tuned, self.wanted)

    def rounded(
        self, weight: Tensor, hessian: Tensor, name: str, shape: tuple[int, int] | None = None
    ) -> Iterator[tuple[Format, Tensor]]:
        """What `weight` (rows, in) becomes in each format, dense float32: a group of one matrix that share its moment.

        shape: of the whole matrix, where `weight` is a sample of its rows.
        """
        formats = self.formats(shape or tuple(weight.shape))
        matrices = [Matrix(weight, format, matrix_generator(self.seed, name), name) for format in formats]
        for format, (_, dense) in zip(formats, rounded(self.backend, matrices, hessian, self.search), strict=True):
            yield format, dense


def smoothed_hessian(moments: LinearMoments, weighting: str) -> Tensor:
    """The moment under `weighting`, at the size (trace) of that by gradients, which costs are measured in."""
    hessian, by_gradient = moments.hessian(weighting), moments.hessian("gradient")
    trace = hessian.trace()
    return hessian * (by_gradient.trace() / trace) if trace > 0 else hessian


def two_sided_cost(error: Tensor, hessian: Tensor, gradient_moment: Tensor) -> float:
    """`1/2 tr(G D H D^T)` of D (out, in), H (in, in), G (out, out)."""
    return 0.5 * ((gradient_moment @ error) * (error @ hessian)).sum().item()


def row_cost(error: Tensor, hessian: Tensor, energy: float) -> float:
    """`E|g|^2 tr(D H D^T) / (2 rows)` of D (rows, in), rows of one kind: any sample of them predicts the whole."""
    return 0.5 * energy * ((error @ hessian) * error).sum().item() / len(error)


def full_rank_costs(
    pricing: Pricing, weight: Tensor, hessian: Tensor, energy: float, name: str
) -> list[tuple[Format, float]]:
    """Every format of the matrix with its cost: evenly spaced rows of it are quantized in each."""
    picked = torch.linspace(0, len(weight) - 1, min(pricing.rows, len(weight)), dtype=torch.float64).round().long()
    sample = weight[picked].float()
    return [
        (format, row_cost(sample - dense, hessian, energy))
        for format, dense in pricing.rounded(sample, hessian, name, tuple(weight.shape))
    ]


@dataclass(frozen=True)
class FactorCosts:
    """What quantizing the factors adds to a linear's cost, at the ranks where it was measured.

    down, up: format (as JSON) -> rank -> nats a token.
    """

    down: Mapping[str, Mapping[int, float]]
    up: Mapping[str, Mapping[int, float]]

    def at(self, rank: int, formats: Sequence[Format]) -> float | None:
        """Of both factors at `rank`, each on the line through the logarithms; None for a format not measured."""
        total = 0.0
        for measured, format in zip((self.down, self.up), formats, strict=True):
            known = measured.get(key(format))
            if not known:
                return None
            degree = min(1, len(known) - 1)
            line = np.polyfit(np.log(list(known)), np.log(list(known.values())), degree)
            total += float(np.exp(np.polyval(line, np.log(rank))))
        return total


def key(format: Format) -> str:
    """One text for one format."""
    return json.dumps(dict(format), sort_keys=True)


def factor_costs(
    pricing: Pricing, weight: Tensor, found: Decomposition, hessian: Tensor, gradient_moment: Tensor, name: str
) -> FactorCosts:
    """Measured at the ranks of `ANCHORS`, each factor in every format while the other is exact.

    `down` is followed by the refit of `up` to it, as in `casp.lowrank.round_factors`; the costs of both add up, since
    their errors are independent and small.
    """
    out_features, in_features = weight.shape
    exact = weight.to(torch.float64)
    h, g = hessian.to(torch.float64), gradient_moment.to(torch.float64)
    costs: tuple[dict[str, dict[int, float]], ...] = ({}, {})
    tiny = torch.finfo(torch.float64).tiny
    anchors = {rank_for(ratio, out_features, in_features) for ratio in ANCHORS}
    for rank in sorted(rank for rank in anchors if rank is not None):
        _, down = found.factors(rank)
        up = refit(exact, down, h, name)
        before = two_sided_cost(exact - up @ down, h, g)
        for format, dense in pricing.rounded(down.float(), hessian, f"{name}.down"):
            known = dense.to(torch.float64)
            after = two_sided_cost(exact - refit(exact, known, h, name) @ known, h, g)
            costs[0].setdefault(key(format), {})[rank] = max(after - before, tiny)
        for format, dense in pricing.rounded(up.float(), (down @ h @ down.T).float(), f"{name}.up"):
            after = two_sided_cost(exact - dense.to(torch.float64) @ down, h, g)
            costs[1].setdefault(key(format), {})[rank] = max(after - before, tiny)
    return FactorCosts(*costs)


def price(pricing: Pricing, weight: Tensor, moments: LinearMoments, role: str, name: str) -> tuple[Option, ...]:
    """All options of the linear `weight` (out, in) with their predicted costs."""
    hessian = smoothed_hessian(moments, pricing.weighting)
    per_loss = moments.tokens / moments.losses  # the means are over all tokens, the damage is counted a predicted one
    energy, gradients = moments.energy * per_loss, moments.gradient_moment * per_loss
    whole = {key(format): cost for format, cost in full_rank_costs(pricing, weight, hessian, energy, name)}
    low_rank = role in pricing.low_rank
    priced = []
    if low_rank:
        found = decompose(weight, hessian, gradients, pricing.damping, name)
        of_factors = factor_costs(pricing, weight, found, hessian, gradients, name)
    for option in layouts(pricing.backend, *weight.shape, low_rank, pricing.tuned, pricing.wanted):
        if option.rank is None:
            priced.append(option.at(whole[key(option.formats[0])]))
            continue
        added = of_factors.at(option.rank, option.formats)
        if added is not None:
            priced.append(option.at(0.5 * found.lost(option.rank) + added))
    return tuple(priced)
