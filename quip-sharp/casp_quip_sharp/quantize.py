"""One weight matrix from floats to QuIP#'s tensors: scales, incoherence, LDLQ, sweeps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from casp.errors import UserError
from casp.linear import is_finite
from casp.strips import row_strips
from casp_quip_sharp.codebook import Codebook
from casp_quip_sharp.incoherence import incoherent_hessian, incoherent_weight, random_signs, unpack_signs
from casp_quip_sharp.ldlq import Factors, Rounded, block_ldl, descend, ldlq
from casp_quip_sharp.linear import padded
from casp_quip_sharp.rescale import POWERS, column_scales

_TRIALS, _SURPRISE = 4, 1.15  # most scales tried on all rows; how far above the runner-up's the loss may then be
_WORTH = 0.03  # share of the loss that a sweep must have taken away for another to be worth its time


def storable(scale: float) -> float:
    """`scale` rounded to eight significant bits: float32, bfloat16 and (from 6e-5 up) float16 hold it exactly."""
    return torch.tensor(scale).to(torch.bfloat16).item()


def gaussian_scale(weight: Tensor, codebook: Codebook) -> float:
    """The scale that is best for Gaussian entries without feedback; 0 for a matrix of zeros."""
    return storable(weight.square().mean().sqrt().item() * codebook.gaussian_scale)


class SharedInput:
    """What matrices of one input have in common: its signs, and its moment rotated by them and factored.

    hessian: (in, in), of any float dtype; damping: share of its mean diagonal that is added to the diagonal; name: what
    messages call it. The signs are drawn by the first matrix that needs them. The moment is rotated in float32, whose
    rounding, 1e-7 of its largest eigenvalue, is far below any damping that LDLQ can use, and factored in float64
    (float32 beyond the widths whose moments are summed in it).
    """

    def __init__(self, hessian: Tensor, damping: float, name: str) -> None:
        self.hessian, self.damping, self.name = hessian, damping, name
        self._signs: dict[int, Tensor] = {}
        self._factors: dict[tuple[int, int], Factors] = {}

    def signs(self, columns: int, generator: torch.Generator | None) -> Tensor:
        """The packed signs of this many (padded) inputs."""
        if columns not in self._signs:
            self._signs[columns] = random_signs(columns, generator)
        return self._signs[columns]

    def factors(self, vector: Tensor, group: int, *, scaled: bool = False) -> Factors:
        """Of the moment in the basis of `vector` (padded in,), in blocks of `group`; kept where it is the signs."""
        key = len(vector), group
        if scaled or key not in self._factors:
            extra = len(vector) - len(self.hessian)
            padded_hessian = F.pad(self.hessian.to(vector), (0, extra, 0, extra)) if extra else self.hessian.to(vector)
            found = block_ldl(incoherent_hessian(padded_hessian, vector), self.damping, group, self.name)
            if scaled:
                return found
            self._factors[key] = found
        return self._factors[key]


@dataclass(frozen=True)
class Basis:
    """A rotated weight (out, in), the factors of its Hessian, rotated and damped, and the inputs' vector (in,)."""

    weight: Tensor
    factors: Factors
    in_vector: Tensor

    @classmethod
    def of(cls, weight: Tensor, out_vector: Tensor, in_vector: Tensor, factors: Factors) -> Self:
        """Rotate `weight` float32; what is divided out of a column returns in `in_vector`."""
        return cls(incoherent_weight(weight, out_vector, 1 / in_vector), factors, in_vector)


@dataclass(frozen=True)
class Candidate:
    """A basis, a scale, and the weighted loss that they promise for a row."""

    loss: float
    basis: Basis
    scale: float


def round_rows(target: Tensor, factors: Factors, codebook: Codebook, sweeps: int) -> tuple[Rounded, Tensor]:
    """LDLQ and at most `sweeps` sweeps of coordinate descent over `target` (rows, in) in units of the codebook.

    A sweep takes away about a tenth of what the one before it took: where that is next to nothing, none follows.
    Returns the points and the weighted loss `e H e^T` of each row, (rows,).
    """
    rounded = ldlq(target, factors, codebook)
    error = target - rounded.points
    gradient = error @ factors.hessian
    losses = (gradient * error).sum(1)
    for _ in range(sweeps):
        before = losses
        rounded, gradient = descend(gradient, factors, rounded, codebook)
        losses = (gradient * (target - rounded.points)).sum(1)
        if losses.sum() > (1 - _WORTH) * before.sum():
            break
    return rounded, losses


def round_matrix(basis: Basis, scale: float, codebook: Codebook, sweeps: int) -> tuple[list[Tensor], Tensor]:
    """The codes of a whole matrix at `scale` and the losses of its rows in units of the codebook, strip by strip."""
    rows, columns = basis.weight.shape
    codes = [
        torch.empty(rows, columns // codebook.group, dtype=dtype, device=basis.weight.device)
        for dtype in codebook.code_dtypes()
    ]
    losses = basis.weight.new_empty(rows)
    for strip in row_strips(rows, columns):
        rounded, losses[strip] = round_rows(basis.weight[strip] / scale, basis.factors, codebook, sweeps)
        for whole, part in zip(codes, rounded.codes, strict=True):
            whole[strip] = part
    return codes, losses


def rank_scales(bases: Sequence[Basis], codebook: Codebook) -> list[Candidate]:
    """Bases and scales in the order of the loss that the codebook's effort shows on a sample of the rows.

    The loss is that of each basis' damped Hessian, as in the rounding itself.
    """
    found, effort = [], codebook.effort
    for basis in bases:
        sample = basis.weight[:: max(len(basis.weight) // effort.rows, 1)]
        scales = [storable(gaussian_scale(basis.weight, codebook) * factor) for factor in effort.factors]
        scale = torch.tensor(scales).repeat_interleave(len(sample))[:, None].to(sample)
        _, losses = round_rows(sample.repeat(len(scales), 1) / scale, basis.factors, codebook, effort.compared_sweeps)
        means = losses.view(len(scales), -1).mean(1).tolist()
        found += [Candidate(scale**2 * mean, basis, scale) for scale, mean in zip(scales, means, strict=True)]
    return sorted(found, key=lambda candidate: candidate.loss)


def round_best(ranked: Sequence[Candidate], codebook: Codebook, sweeps: int) -> tuple[Candidate, list[Tensor]]:
    """Codes with the first of `ranked`; with the next ones where a few rows that the sample missed went astray.

    Under a nearly singular Hessian feedback can grow beyond the codebook's reach, which costs such a row a hundred
    times what others cost.
    """
    tried = []
    for candidate, runner_up in zip_longest(ranked[:_TRIALS], ranked[1:_TRIALS]):
        basis, scale = candidate.basis, candidate.scale
        codes, losses = round_matrix(basis, scale, codebook, sweeps)
        tried.append((scale**2 * losses.mean().item(), candidate, codes))
        if runner_up is None or tried[-1][0] <= _SURPRISE * runner_up.loss:
            break
    _, candidate, codes = min(tried, key=lambda entry: entry[0])
    return candidate, codes


def draw_signs(
    rows: int, columns: int, shared: SharedInput, codebook: Codebook, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The packed signs of a matrix' outputs and, if it is the first of its (padded) inputs, of those."""
    return random_signs(rows, generator), shared.signs(padded(columns, codebook), generator)


def quantize_matrix(
    weight: Tensor,
    shared: SharedInput,
    codebook: Codebook,
    generator: torch.Generator | None = None,
    *,
    tuned: bool = False,
    search_scale: bool = True,
    sweeps: int | None = None,
    name: str = "weight",
) -> dict[str, Tensor]:
    """Quantize `weight` (out, in) under the H = E[x x^T] of `shared`, minimising `tr(E H E^T)`.

    generator: draws the signs. tuned: return real vectors, which fine-tuning can move, in the place
    of signs. search_scale: compare scales, with real vectors also those of the columns, under the weighted loss instead
    of taking the Gaussian's. sweeps: most rounds of coordinate descent after LDLQ, None for the codebook's own. name:
    the layer, for messages.

    Works in float32 on the device of `weight`, factoring in float64. Returns the tensors of a `QuipSharpLinear`.
    UserError when something is not finite or the shapes do not match.
    """
    rows, columns = weight.shape
    sweeps = codebook.effort.sweeps if sweeps is None else sweeps
    if not is_finite(weight):
        raise UserError(f"{name}: its weight holds NaN or infinity; download or write the checkpoint again.")
    if shared.hessian.shape != (columns, columns):
        raise UserError(
            f"{name}: a Hessian of shape {tuple(shared.hessian.shape)} does not fit a weight of {columns} columns; "
            "take both from the same layer."
        )
    device, extra = weight.device, padded(columns, codebook) - columns
    out_signs, in_signs = (signs.to(device) for signs in draw_signs(rows, columns, shared, codebook, generator))
    out_vector, in_vector = unpack_signs(out_signs, rows), unpack_signs(in_signs, columns + extra)
    weight = weight.float()
    scalings = POWERS if tuned and search_scale else POWERS[:1]
    bases = []
    for powers in scalings:
        vector, scaled = in_vector, any(powers)
        if scaled:
            scales = column_scales(weight, shared.hessian.to(device), powers)
            vector = (in_vector / F.pad(scales, (0, extra), value=1.0)).to(torch.bfloat16).float()
        factors = shared.factors(vector, codebook.group, scaled=scaled)
        bases.append(Basis.of(F.pad(weight, (0, extra)) if extra else weight, out_vector, vector, factors))
    usual = gaussian_scale(bases[0].weight, codebook)
    if not math.isfinite(usual) or not all(is_finite(basis.weight) for basis in bases):
        raise UserError(f"{name}: its weights are too large, up to {weight.abs().max():.1e}; check the checkpoint.")
    if usual and search_scale:
        chosen, found = round_best(rank_scales(bases, codebook), codebook, sweeps)
    else:
        chosen = Candidate(0.0, bases[0], usual)
        found, _ = round_matrix(bases[0], usual or 1.0, codebook, sweeps)
    codes = codebook.stored(found)
    if tuned:
        return {
            **codes,
            "out_vector": (out_vector * chosen.scale).to(torch.bfloat16),
            "in_vector": chosen.basis.in_vector.to(torch.bfloat16),
        }
    return {
        **codes,
        "out_signs": out_signs,
        "in_signs": in_signs,
        "scale": torch.tensor(chosen.scale, dtype=torch.float32, device=device),
    }
