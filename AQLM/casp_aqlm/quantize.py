"""AQLM of one matrix: codes, codebooks and scales in turn, each the best for the others.

Egiazarian et al. 2024, arXiv 2401.06118. Where the published code starts from k-means of the weights, here the first
codes are rounded with error feedback, so that the alternation starts about where it would otherwise end.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from casp.errors import UserError
from casp.linear import stored_as
from casp_aqlm.codebooks import best_scales, first_codebooks, in_whole_numbers, refit
from casp_aqlm.codes import descend, round_with_feedback
from casp_aqlm.factors import Factors, order_of_activation, weighted_loss
from casp_aqlm.linear import decode
from casp_aqlm.nearest import JOINT, Search
from casp_aqlm.packing import pack
from casp_aqlm.scheme import ENTRY_DTYPES, Scheme

log = logging.getLogger(__name__)

_STEPS = 10  # of conjugate gradients in each refit of the codebooks
_EMPTY = 1e-8  # scale of a row of zeros: float16 holds it as the smallest positive number or 0


@dataclass
class Additive:
    """A matrix as codes (rows, groups, M), codebooks (M, 2^B, g) and scales (rows,), and how it came about.

    history: (seconds, relative loss `tr(E H E^T) / tr(W H W^T)` under the damped H) after each step.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    history: list[tuple[float, float]] = field(default_factory=list)

    def points(self) -> Tensor:
        """What the codes stand for, without the scales: (rows, groups * g)."""
        return decode(self.codes, self.codebooks)

    def dequantize(self) -> Tensor:
        """The matrix, (rows, groups * g)."""
        return self.points() * self.scales[:, None]


def quantize_additive(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    generator: torch.Generator,
    *,
    damping: float = 0.01,
    tolerance: float = 0.01,
    max_rounds: int = 12,
    search: Search = JOINT,
    clock: Callable[[], float] = time.perf_counter,
    name: str = "weight",
) -> Additive:
    """Minimise `tr(E H E^T)`, E = weight - W^, over everything that `scheme` stores; rounded to what it stores.

    weight: (out, in) with in a multiple of the scheme's group; hessian: (in, in) = E[x x^T]; generator (CPU) draws the
    vectors that codebooks start from. damping: share of the mean diagonal added to H's. tolerance: the relative gain of
    a round below which none follows; max_rounds: the most. clock: of the history, in seconds. name: the layer, for
    messages. Works in float32 on the device of `weight`, factoring in float64.
    """
    began = clock()
    order = order_of_activation(hessian.to(weight.device), scheme.group)
    columns = (order[:, None] * scheme.group + torch.arange(scheme.group, device=order.device)).flatten()
    weight, hessian = weight[:, columns], hessian.to(weight.device, torch.float64)[columns][:, columns]
    factors = Factors.of(hessian, scheme.group, damping, name)
    energy = weighted_loss(weight, factors.hessian).sum().item() or 1.0
    scales = weight.square().mean(1).sqrt().clamp_min(_EMPTY)
    target = weight / scales[:, None]
    codebooks = first_codebooks(target, scales.square(), factors, scheme, search, generator)
    codes = round_with_feedback(target, codebooks, factors, search)
    state = Additive(codes, codebooks, scales)

    def record(what: str) -> float:
        loss = weighted_loss(weight - state.dequantize(), factors.hessian).sum().item() / energy
        state.history.append((clock() - began, loss))
        log.debug("%s: %s, %.2f s, relative loss %.6f", name, what, *state.history[-1])
        return loss

    def fit_scales() -> Tensor:
        state.scales = best_scales(weight, state.points(), factors.hessian, state.scales)
        return weight / state.scales[:, None]

    before = record("first codes")
    for _ in range(max_rounds):
        row_weights = state.scales.square()
        state.codebooks = refit(target, state.codes, state.codebooks, row_weights, factors, _STEPS)
        target = fit_scales()
        record("codebooks and scales")
        state.codes = descend(target, state.codes, state.codebooks, factors, search)
        after = record("codes")
        if after > (1 - tolerance) * before:
            break
        before = after
    row_weights = state.scales.square()
    state.codebooks = refit(target, state.codes, state.codebooks, row_weights, factors, _STEPS)
    dtype = ENTRY_DTYPES[scheme.entries]
    if dtype == torch.int8:
        state.codebooks, unit = in_whole_numbers(target, state.codes, state.codebooks, row_weights, factors)
        state.scales = state.scales * unit
    state.codebooks = stored_as(state.codebooks, dtype).float()
    state.codes = descend(fit_scales(), state.codes, state.codebooks, factors, search)
    fit_scales()
    state.scales = state.scales.half().float()
    record("rounded to what is stored")
    state.codes = state.codes[:, order.argsort()]
    return state


def quantize_matrix(
    weight: Tensor, hessian: Tensor, scheme: Scheme, generator: torch.Generator, *, name: str = "weight", **settings
) -> dict[str, Tensor]:
    """The tensors of an `AQLMLinear` for `weight` (out, in) under `hessian` (in, in); settings: `quantize_additive`'s.

    UserError when something is not finite or the shapes do not match.
    """
    columns = weight.shape[1]
    if not torch.isfinite(weight).all():
        raise UserError(f"{name}: its weight holds NaN or infinity; download or write the checkpoint again.")
    if hessian.shape != (columns, columns):
        raise UserError(
            f"{name}: a Hessian of shape {tuple(hessian.shape)} does not fit a weight of {columns} columns; "
            "take both from the same layer."
        )
    extra = scheme.padded(columns) - columns
    weight, hessian = F.pad(weight.float(), (0, extra)), F.pad(hessian, (0, extra, 0, extra))
    found = quantize_additive(weight, hessian, scheme, generator, name=name, **settings)
    return {
        "codes": pack(found.codes.flatten(1), scheme.code_bits),
        "codebooks": stored_as(found.codebooks, ENTRY_DTYPES[scheme.entries]),
        "scales": found.scales.half(),
    }
