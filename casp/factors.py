"""One linear of a block from its dense weight to quantized low-rank factors, as a plan says."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from casp.backend import Backend, Format, Matrix, rounded
from casp.linear import LowRankLinear
from casp.lowrank import WHITENING_DAMPING, RoundedFactors, decompose, round_factors
from casp.seed import matrix_generator

FACTORS = ("down", "up")


def quantized_factors(
    weight: Tensor,
    hessian: Tensor,
    gradient_moment: Tensor,
    rank: int,
    formats: Sequence[Format],
    backend: Backend,
    seed: int,
    name: str,
    settings: Mapping[str, Any],
) -> RoundedFactors:
    """`weight` (out, in) at `rank`, whitened by `hessian` (in, in) and `gradient_moment` (out, out), rounded.

    formats: of down and up; seed and name decide what is random in rounding; settings: the backend's knobs.
    """
    named = dict(zip(FACTORS, formats, strict=True))

    def rounder(factor: Tensor, moment: Tensor, which: str) -> tuple[dict[str, Tensor], Tensor]:
        path = f"{name}.{which}"
        one = Matrix(factor, named[which], matrix_generator(seed, path), path)
        return next(rounded(backend, [one], moment, settings))

    found = decompose(weight, hessian, gradient_moment, WHITENING_DAMPING, name)
    return round_factors(weight, found.factors(rank)[1], hessian, rounder, name)


def low_rank_module(
    linear: nn.Linear,
    rank: int,
    formats: Sequence[Format],
    backend: Backend,
    stored: Sequence[Mapping[str, Tensor]],
) -> LowRankLinear:
    """The module that stands in for `linear`: `stored`, of down and up, in these `formats`, its bias with `up`."""
    has_bias, dtype, device = linear.bias is not None, linear.weight.dtype, linear.weight.device
    module = LowRankLinear(linear.in_features, linear.out_features, rank, has_bias, dtype=dtype, device="meta")
    shapes = ((rank, linear.in_features, False), (linear.out_features, rank, has_bias))
    for which, format, tensors, (rows, columns, bias) in zip(FACTORS, formats, stored, shapes, strict=True):
        factor = backend.linear(rows, columns, bias, format, dtype=dtype, device=device)
        factor.load_state_dict({**tensors, "bias": linear.bias.detach()} if bias else tensors)
        setattr(module, which, factor)
    return module
