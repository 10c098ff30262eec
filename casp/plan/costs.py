"""What an option of a linear costs the model, predicted from moments, spectra and a few quantized samples.

Let y = W x be a linear's output and g the gradient of the model's summed next-token loss at y. To second order (Fisher)
an error D of W costs `1/2 E[(g^T D x)^2]` nats a token. With G = E[g g^T] and H the second moment of x weighted by
|g|^2 (mean weight 1) that is about `1/2 tr(G D H D^T)` (the Kronecker split of YAQA, arXiv 2505.22988); where the rows
of D are alike, as a rotation makes them, `tr(G) tr(D H D^T) / (2 out)` (GuidedQuant, arXiv 2505.07004). Small errors
are predicted well, large ones too low: the order is what counts.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from casp.backend import Backend, Format, Matrix, rounded
from casp.lowrank import LOW_RANK_ROLES, WHITENING_DAMPING, leading, rank_for
from casp.plan.factors import Extent, FactorCosts, Factored, Sample, sample_of, under
from casp.plan.options import Option, chosen_formats, layouts
from casp.seed import matrix_generator

ANCHORS = (0.1875, 0.5625)
"""Keep ratios at which factors are really quantized; for other ranks costs follow a power of the rank."""
FINE = 0.03
"""Mean squared error on N(0, 1) below which costs of formats are told from each other, where the backend has no word
of its own for it."""
_SMALL_SHAPE = (128, 512)  # for which a backend may have other formats
_ANY_SHAPE = (1024, 1024)  # whose formats stand in a run's record for what its words mean


class LinearMoments(Protocol):
    """What the moments of one linear must offer (casp.moments)."""

    energy: float | None
    tokens: int
    losses: int | None
    gradient_moment: Tensor | None

    def hessian(self, weighting: str, sized_as: str | None = None) -> Tensor:
        """(in, in) float32 second moment of the input under a weighting of the tokens, of the trace of another."""


def key(format: Format) -> str:
    """One text for one format."""
    return json.dumps(dict(format), sort_keys=True)


@dataclass(frozen=True)
class Pricing:
    """How options are priced.

    settings: the backend's knobs of the search, its own for a draft where None; weighting: of the tokens in the moment
    that matrices are rounded and whitened under; damping: of the whitening; rows: of a matrix or a factor, that are
    quantized to price it, more where the backend asks for larger samples; low_rank: roles that may become low-rank;
    tuned: formats that fine-tuning can move; wanted: words of the backend that choose its formats.
    """

    backend: Backend
    settings: Mapping[str, Any] | None = None
    weighting: str = "attention+gradient"
    damping: float = WHITENING_DAMPING
    rows: int = 64
    low_rank: frozenset[str] = LOW_RANK_ROLES
    tuned: bool = False
    wanted: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def search(self) -> Mapping[str, Any]:
        """The backend's knobs in use."""
        return self.backend.draft if self.settings is None else self.settings

    @property
    def extent(self) -> Extent:
        """How much of a matrix or a factor is quantized to price it."""
        return Extent(self.rows, getattr(self.backend, "least_sample", 0))

    @property
    def fine(self) -> float:
        """The distortion below which costs of formats are told from each other."""
        return getattr(self.backend, "fine", FINE)

    def record(self) -> dict[str, Any]:
        """What decides the costs, besides the model and its moments: for the fingerprint."""
        return {
            "backend": self.backend.name,
            "search": dict(self.search),
            "token_weights": self.weighting,
            "damping": self.damping,
            "rows": self.rows,
            **({"weights": self.extent.weights} if self.extent.weights else {}),
            **self._record_of_distortions(),
            "low_rank": sorted(self.low_rank),
            "tuned": self.tuned,
            "format": dict(self.wanted),
            "formats": self.formats(_ANY_SHAPE),
            "seed": self.seed,
        }

    def _record_of_distortions(self) -> dict[str, Any]:
        shapes = (_SMALL_SHAPE, _ANY_SHAPE)
        told = {key(format): self._distortion(format, shape) for shape in shapes for format in self.formats(shape)}
        finite = {name: value for name, value in told.items() if math.isfinite(value)}
        return {"fine": self.fine, "distortions": finite} if finite else {}

    def formats(self, shape: tuple[int, int]) -> list[Format]:
        """The formats that a matrix of this shape may take."""
        return chosen_formats(self.backend, *shape, self.tuned, self.wanted)

    def costs(self, samples: Sequence[Sample], hessian: Tensor) -> list[dict[str, float]]:
        """For each of `samples`, which share the moment (in, in), the cost of every format of its shape, by `key`.

        All that is rounded is one group, whose moment is worked on once.
        """
        formats = [self.formats(sample.shape) for sample in samples]
        tried = [
            (sample, format)
            for sample, offered in zip(samples, formats, strict=True)
            for format in self.measured(offered, sample.shape)
        ]
        matrices = [
            Matrix(sample.weight.float(), format, matrix_generator(self.seed, sample.name), sample.name)
            for sample, format in tried
        ]
        found: list[dict[str, float]] = [{} for _ in samples]
        place = {id(sample): costs for sample, costs in zip(samples, found, strict=True)}
        made = rounded(self.backend, matrices, hessian.float(), self.search)
        for (sample, format), (_, dense) in zip(tried, made, strict=True):
            place[id(sample)][key(format)] = sample.cost(dense) * self._of_the_whole(format, sample)
        return [
            self._completed(costs, offered, sample.shape)
            for costs, offered, sample in zip(found, formats, samples, strict=True)
        ]

    def measured(self, formats: Sequence[Format], shape: tuple[int, int]) -> list[Format]:
        """Those of `formats` of a matrix of `shape` that are tried: of the fine ones of a backend that knows its
        distortions the coarsest.
        """
        fine = [format for format in formats if self._distortion(format, shape) < self.fine]
        kept = max(fine, key=lambda format: self._distortion(format, shape), default=None)
        return [format for format in formats if format not in fine or format == kept]

    def _distortion(self, format: Format, shape: tuple[int, int]) -> float:
        told = getattr(self.backend, "distortion", None)
        return math.inf if told is None else told(format, *shape)

    def _of_the_whole(self, format: Format, sample: Sample) -> float:
        """How much larger the error of the whole matrix is than that of the sample, to which more could be fitted."""
        part, whole = (self._distortion(format, tuple(shape)) for shape in (sample.weight.shape, sample.shape))
        return whole / part if math.isfinite(part) and math.isfinite(whole) else 1.0

    def _completed(
        self, costs: dict[str, float], formats: Sequence[Format], shape: tuple[int, int]
    ) -> dict[str, float]:
        """`costs` of what was tried with those of the other formats.

        Where errors are far smaller than the weights, feedback does not make them grow, and they are to each other as
        the distortions of a Gaussian are: QuIP#'s on demo-llama, from 3 bits on, within 2% on average.
        """
        known = {key(format): self._distortion(format, shape) for format in formats}
        fine = next((name for name in costs if known[name] < self.fine), None)
        told = {name: costs[fine] * known[name] / known[fine] for name in known if name not in costs}
        return {name: max((costs | told)[name], sys.float_info.min) for name in known}


def price(pricing: Pricing, weight: Tensor, moments: LinearMoments, role: str, name: str) -> tuple[Option, ...]:
    """All options of the linear `weight` (out, in) with their predicted costs."""
    hessian = moments.hessian(pricing.weighting, sized_as="gradient").to(weight.device)
    per_loss = moments.tokens / moments.losses  # the means are over all tokens, the damage is counted a predicted one
    sample = sample_of(weight, pricing.extent, under(hessian), moments.energy * per_loss, name)
    low_rank, downs = role in pricing.low_rank, []
    if low_rank:
        gradients = (moments.gradient_moment * per_loss).to(weight.device)
        ranks = sorted({rank_for(ratio, *weight.shape) for ratio in ANCHORS} - {None})
        down, spectrum = leading(weight, hessian, gradients, max(ranks, default=0), pricing.damping, name)
        anchors = Factored.of(weight, hessian, gradients, pricing.extent, name).anchors(down, ranks)
        downs = [anchor.sample_of_down() for anchor in anchors]
    whole, *of_down = pricing.costs([sample, *downs], hessian)
    if low_rank:
        of_up = [pricing.costs([anchor.sample_of_up()], anchor.inner)[0] for anchor in anchors]
        added = FactorCosts.of([anchor.rank for anchor in anchors], of_down, of_up)
    priced = []
    for option in layouts(pricing.backend, *weight.shape, low_rank, pricing.tuned, pricing.wanted):
        names = [key(format) for format in option.formats]
        if option.rank is None:
            priced.append(option.at(whole[names[0]]))
            continue
        more = added.at(option.rank, *names)
        if more is not None:
            priced.append(option.at(0.5 * spectrum.lost(option.rank) + more))
    return tuple(priced)
