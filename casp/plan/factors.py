"""What rounding the factors of a low-rank linear costs, measured at a few ranks and told for the others."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from casp.lowrank import best_up


@dataclass(frozen=True)
class Extent:
    """How much of a matrix is rounded to price it: `rows`, or as many as hold `weights` where that is more."""

    rows: int
    weights: int = 0

    def of(self, weight: Tensor) -> Tensor:
        """The rows of `weight` (out, in) that are sampled, evenly spaced: int64, on its device."""
        count = min(max(self.rows, -(-self.weights // weight.shape[1])), len(weight))
        return torch.linspace(0, len(weight) - 1, count, dtype=torch.float64).round().long().to(weight.device)


@dataclass(frozen=True)
class Sample:
    """A matrix that is rounded to price it.

    weight: (rows, in), all of a matrix of `shape` or some rows; cost: of the dense matrix that it became, nats a token.
    """

    name: str
    weight: Tensor
    shape: tuple[int, int]
    cost: Callable[[Tensor], float]


Square = Callable[[Tensor], Tensor]
"""An error (rows, in) -> what each of its rows is under a moment, `D_i H D_i^T`, (rows,)."""


def under(hessian: Tensor) -> Square:
    """Squares under `hessian` (in, in)."""
    return lambda error: ((error @ hessian) * error).sum(1)


def row_cost(error: Tensor, square: Square, energy: float) -> float:
    """`E|g|^2 tr(D H D^T) / (2 rows)` of D (rows, in), rows of one kind: any sample of them predicts the whole."""
    return 0.5 * energy * square(error).sum().item() / len(error)


def sample_of(weight: Tensor, extent: Extent, square: Square, energy: float, name: str) -> Sample:
    """The rows of `weight` (out, in) that tell what rounding all of it costs.

    Errors grow with the weights: what rows that are larger than others on average cost is taken down by their ratio.
    """
    sample, size = weight[extent.of(weight)].float(), weight.float().square().mean().item()
    own = sample.square().mean().item()
    share = energy * (size / own if own else 1.0)
    return Sample(name, sample, tuple(weight.shape), lambda dense: row_cost(sample - dense, square, share))


@dataclass(frozen=True)
class Factored:
    """The costs of errors in the factors of `weight` W (out, in), each while the other is exact.

    An error E of `down` is followed by the refit of `up` (`casp.lowrank.round_factors`), which makes good what of E
    lies in the span that the rows of `down` have under H: to first order `1/2 tr(U^T G U E H' E^T)` is left, with
    `H' = H - H down^T (down H down^T)^-1 down H`. An error E of `up` U costs `1/2 tr(G E down H down^T E^T)`. The
    rotation makes the rows of E alike, so a sample of them tells both; as both are small and independent, they add up.

    hessian: H (in, in), gradients: G (out, out), both float64; extent: how much of a factor is sampled.
    """

    weight: Tensor
    hessian: Tensor
    gradients: Tensor
    extent: Extent
    name: str

    @classmethod
    def of(cls, weight: Tensor, hessian: Tensor, gradients: Tensor, extent: Extent, name: str) -> "Factored":
        """From tensors of any float dtype."""
        weight, hessian, gradients = (tensor.to(torch.float64) for tensor in (weight, hessian, gradients))
        return cls(weight, hessian, gradients, extent, name)

    def anchors(self, down: Tensor, ranks: Sequence[int]) -> list["Anchor"]:
        """At each of `ranks` the first so many rows of `down` (the largest, in), float64, with the best up for them."""
        met = down @ self.hessian
        inner, crossed = met @ down.T, self.weight @ met.T
        found = []
        for rank in ranks:
            within = inner[:rank, :rank]
            up = best_up(crossed[:, :rank], within, self.name)
            found.append(Anchor(self, down[:rank], up, met[:rank], within))
        return found


@dataclass(frozen=True)
class Anchor:
    """A rank at which factors are really rounded. met: `down H`; inner: `down H down^T`; float64."""

    of: Factored
    down: Tensor
    up: Tensor
    met: Tensor
    inner: Tensor

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return len(self.down)

    def _missed(self, error: Tensor) -> Tensor:
        """`E_i H' E_i^T` of `Factored`, without H' itself."""
        error = error.to(torch.float64)
        crossed = error @ self.met.T
        return under(self.of.hessian)(error) - (best_up(crossed, self.inner, self.of.name) * crossed).sum(1)

    def sample_of_down(self) -> Sample:
        """Rows of `down`, to be rounded under H, whose errors count where `up` cannot make them good."""
        energy = ((self.of.gradients @ self.up) * self.up).sum().item()
        return sample_of(self.down, self.of.extent, self._missed, energy, f"{self.of.name}.down")

    def sample_of_up(self) -> Sample:
        """Rows of `up`, to be rounded under `inner`."""
        energy = self.of.gradients.trace().item()
        return sample_of(self.up, self.of.extent, under(self.inner.float()), energy, f"{self.of.name}.up")


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
