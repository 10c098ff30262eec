"""What rounding the factors of a low-rank linear costs, measured at a few ranks and told for the others."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from casp.lowrank import best_up


@dataclass(frozen=True)
class Sample:
    """A matrix that is rounded to price it.

    weight: (rows, in), all of a matrix of `shape` or some rows; cost: of the dense matrix that it became, nats a token.
    """

    name: str
    weight: Tensor
    shape: tuple[int, int]
    cost: Callable[[Tensor], float]


def two_sided_cost(error: Tensor, hessian: Tensor, gradient_moment: Tensor) -> float:
    """`1/2 tr(G D H D^T)` of D (out, in), H (in, in), G (out, out)."""
    return 0.5 * ((gradient_moment @ error) * (error @ hessian)).sum().item()


class Factored:
    """The costs of errors in the factors of `weight` W (out, in), each while the other is exact.

    `down` is followed by the refit U of `up` to it, as in `casp.lowrank.round_factors`; the costs of both add up, since
    their errors are independent and small. As `(W - U down) H down^T = 0`, `tr(G (W - U down) H (W - U down)^T)` is
    `tr(G W H W^T) - tr(G U down H W^T)`, and an error E of U adds `tr(G E down H down^T E^T)`: no product of whole
    matrices is needed for either.
    """

    def __init__(self, weight: Tensor, hessian: Tensor, gradient_moment: Tensor, name: str) -> None:
        self.name = name
        self.hessian, self.gradients = hessian.to(torch.float64), gradient_moment.to(torch.float64)
        self._seen = weight.to(torch.float64) @ self.hessian

    def refit(self, down: Tensor) -> tuple[Tensor, Tensor, float]:
        """For `down` (rank, in) the best up (out, rank), `down H down^T`, and the part of the energy they explain."""
        down = down.to(torch.float64)
        crossed, inner = self._seen @ down.T, down @ self.hessian @ down.T
        up = best_up(crossed, inner, self.name)
        return up, inner, ((self.gradients @ up) * crossed).sum().item()

    def anchor(self, down: Tensor) -> "Anchor":
        """The factors at the rank of `down`, as exact as they can be."""
        return Anchor(self, down, *self.refit(down))


@dataclass(frozen=True)
class Anchor:
    """A rank at which factors are really rounded. inner: `down H down^T`; explained: see `Factored.refit`; float64."""

    of: Factored
    down: Tensor
    up: Tensor
    inner: Tensor
    explained: float

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return len(self.down)

    def sample_of_down(self) -> Sample:
        """`down`, whose cost is what no `up` can make good."""
        return Sample(
            f"{self.of.name}.down",
            self.down,
            tuple(self.down.shape),
            lambda dense: 0.5 * (self.explained - self.of.refit(dense)[2]),
        )

    def sample_of_up(self) -> Sample:
        """`up`, to be rounded under `inner`."""
        return Sample(
            f"{self.of.name}.up",
            self.up,
            tuple(self.up.shape),
            lambda dense: two_sided_cost(self.up - dense.to(torch.float64), self.inner, self.of.gradients),
        )


@dataclass(frozen=True)
class FactorCosts:
    """What quantizing the factors adds to a linear's cost, at the ranks where it was measured.

    down, up: format (as text) -> rank -> nats a token.
    """

    down: Mapping[str, Mapping[int, float]]
    up: Mapping[str, Mapping[int, float]]

    @classmethod
    def of(
        cls, ranks: Sequence[int], down: Sequence[Mapping[str, float]], up: Sequence[Mapping[str, float]]
    ) -> "FactorCosts":
        """From the costs of all formats at each of `ranks`."""
        sides: list[dict[str, dict[int, float]]] = []
        for side in (down, up):
            sides.append({})
            for rank, costs in zip(ranks, side, strict=True):
                for name, cost in costs.items():
                    sides[-1].setdefault(name, {})[rank] = cost
        return cls(*sides)

    def at(self, rank: int, down: str, up: str) -> float | None:
        """Of both factors at `rank`, each on the line through the logarithms; None for a format not measured."""
        known = self.down.get(down), self.up.get(up)
        return None if None in known else sum(_on_the_line(costs, rank) for costs in known)


def _on_the_line(known: Mapping[int, float], rank: int) -> float:
    """The value at `rank` of the power of the rank that fits one value or several best in logarithms."""
    xs, ys = [math.log(x) for x in known], [math.log(y) for y in known.values()]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((one - x) ** 2 for one in xs)
    slope = sum((one - x) * other for one, other in zip(xs, ys, strict=True)) / spread if spread else 0.0
    return math.exp(y + slope * (math.log(rank) - x))
