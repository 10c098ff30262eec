"""GPTQ: rounding one weight matrix column by column, each error made good by the columns still to come.

Frantar et al. 2022, arXiv 2210.17323, Algorithm 1. The paper updates the remaining columns through the Cholesky
factor of H^-1. With `H = R R^T`, R upper triangular, that factor is R^-1, and `tr(D H D^T) = |D R|^2`: column j
costs `(sum_{i<j} D_i R_ij + D_j R_jj)^2`, so the best value for it is `w_j + sum_{i<j} D_i R_ij / R_jj`, the
very number that the paper's updates produce (QuIP, arXiv 2307.13304, Theorem 6), without inverting anything.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from casp.errors import UserError
from casp.linear import is_finite
from casp.moments.symmetric import panels
from casp.strips import row_strips
from casp_gptq.grid import check_format, find_grid, group_bounds, to_codes
from casp_gptq.moment import Moment
from casp_gptq.refine import PANEL, refine

_BLOCK = 64  # columns between two updates of the panel that they are in


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix: `scales[:, g] * (codes[:, j] - zeros[:, g])`, column j in group `j // group_size`.

    codes (out, in) uint8; scales (out, groups) float16; zeros (out, groups) uint8; group_size in columns.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int

    def dequantize(self) -> Tensor:
        """The matrix that the codes stand for, (out, in) float32."""
        group = torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size
        return self.scales.float()[:, group] * (self.codes.float() - self.zeros.float()[:, group])


def check_inputs(weight: Tensor, hessian: Tensor, name: str) -> None:
    """UserError that names the layer when its weight holds NaN or infinity or the Hessian has another width."""
    if not is_finite(weight):
        raise UserError(f"{name} holds NaN or infinity; download or write the checkpoint again.")
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise UserError(
            f"{name} has {weight.shape[1]} columns, its Hessian the shape {tuple(hessian.shape)}; take both from the "
            "same layer."
        )


def _round_block(
    lower: Tensor,
    target: Tensor,
    pending: Tensor,
    grids: list[tuple[Tensor, Tensor]],
    bits: int,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """Round neighbouring columns in order, into `codes` and `errors` = target - rounded; all (columns, out).

    lower: the block's (columns, columns) corner of R^T; pending: `(D R)_j` over the columns before the block; grids:
    scale and zero, (out,) each, of every column.
    """
    # Taken apart into columns beforehand: an index into a tensor costs as much as the sums on a column.
    columns = zip(lower, lower.diagonal().tolist(), target, pending, grids, codes, errors, strict=True)
    for j, (row, pivot, wanted, earlier, (scale, zero), code, error) in enumerate(columns):
        carried = torch.addmv(earlier, errors[:j].T, row[:j])  # (D R)_j
        code.copy_(to_codes(torch.add(wanted, carried, alpha=1 / pivot), scale, zero, bits))
        torch.addcmul(wanted, code - zero, scale, value=-1, out=error)


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int = 128,
    *,
    symmetric: bool = False,
    act_order: bool = True,
    damping: float = 0.01,
    clip_steps: int = 20,
    sweeps: int = 2,
    name: str = "the weight",
) -> Quantized:
    """Quantize `weight` (out, in) under `hessian` = E[x x^T] (in, in), minimising `tr(D H D^T)`.

    bits: 2, 3, 4 or 8; group_size: columns that share a scale, -1 for whole rows; the last group may be short.
    act_order: round the columns with the largest inputs first. Groups stay runs of neighbouring columns, their
    grids are then found beforehand on the original weights (no column-to-group index has to be stored);
    without act-order a group's grid is found when its first column is reached, as in the paper.
    damping: share of the mean diagonal added to the diagonal of `hessian`. clip_steps: see `find_grid`.
    sweeps: rounds of refinement after the paper's pass, 0 for the plain algorithm, see `refine`.
    name: what messages call the matrix. An input that never occurred in calibration has its weights rounded to
    nearest: they cost nothing now and are right if it occurs later.

    Works in float32 on the device of `weight`, with a float64 factor of the Hessian. Raises UserError for NaN.
    """
    check_inputs(weight, hessian, name)
    moment = Moment.of(hessian, damping, act_order, name)
    return quantize_under(
        weight, moment, bits, group_size, symmetric=symmetric, act_order=act_order, clip_steps=clip_steps, sweeps=sweeps
    )


def quantize_under(
    weight: Tensor,
    moment: Moment,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = False,
    act_order: bool = True,
    clip_steps: int = 20,
    sweeps: int = 2,
) -> Quantized:
    """As `gptq_quantize`, under a moment made ready by the same act_order: shared by matrices of one input."""
    check_format(bits, group_size)
    settings = {"symmetric": symmetric, "act_order": act_order, "clip_steps": clip_steps, "sweeps": sweeps}
    rows, columns = weight.shape
    # To fit a row's scales takes about four squares of as many numbers as it has groups.
    held = columns + len(group_bounds(columns, group_size)) ** 2 // 3
    strips = [_quantize_rows(weight[strip], moment, bits, group_size, **settings) for strip in row_strips(rows, held)]
    return Quantized(
        codes=torch.cat([strip.codes for strip in strips]),
        scales=torch.cat([strip.scales for strip in strips]),
        zeros=torch.cat([strip.zeros for strip in strips]),
        group_size=strips[0].group_size,
    )


def _quantize_rows(
    weight: Tensor,
    moment: Moment,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    act_order: bool,
    clip_steps: int,
    sweeps: int,
) -> Quantized:
    """Some rows of `quantize_under`'s weight, all at once."""
    out_features, columns = weight.shape
    bounds = group_bounds(columns, group_size)
    order, lower = moment.order, moment.lower
    group_of = (torch.arange(columns, device=weight.device) // bounds[0][1])[order]
    # What rounding column j costs once later columns have made good what they can: R_jj^2, not H_jj.
    importance = lower.diagonal().square()

    # Everything below is transposed, (in, out): a column of the weight is then contiguous.
    target = weight.float().T[order].contiguous()
    codes, errors = torch.empty_like(target), torch.empty_like(target)
    pending = torch.zeros_like(target)  # (D R)_j over the columns that earlier blocks have rounded
    scales = target.new_empty(len(bounds), out_features)
    zeros = torch.empty_like(scales)
    grids, grid_of = list(zip(scales, zeros, strict=True)), group_of.tolist()
    if act_order:
        for g in range(len(bounds)):
            mine = (group_of == g).nonzero()[:, 0]
            scales[g], zeros[g] = find_grid(target[mine].T, bits, symmetric, clip_steps, importance[mine])
        spans = [(0, columns)]
    else:
        spans = bounds
    for g, (first, last) in enumerate(spans):
        if not act_order:
            # The values that the group's columns would take if rounding stopped here.
            corner = lower[first:last, first:last]
            shift = torch.linalg.solve_triangular(corner, pending[first:last], upper=False)
            values = target[first:last] + shift
            scales[g], zeros[g] = find_grid(values.T, bits, symmetric, clip_steps, importance[first:last])
        for panel in panels(columns, PANEL, slice(first, last)):
            for here in panels(columns, _BLOCK, panel):
                own, near = [grids[g] for g in grid_of[here]], slice(here.stop, panel.stop)
                _round_block(lower[here, here], target[here], pending[here], own, bits, codes[here], errors[here])
                pending[near].addmm_(lower[near, here], errors[here])
            pending[panel.stop :].addmm_(lower[panel.stop :, panel], errors[panel])

    back = torch.argsort(order)
    codes, target = codes[back], target[back]
    if sweeps and moment.damping < math.inf:  # what has no factor, damped or not, is nothing to descend on
        codes, scales = refine(target, moment.damped(), codes, scales, zeros, bounds, bits, sweeps)
    return Quantized(
        codes=codes.T.to(torch.uint8).contiguous(),
        scales=scales.T.to(torch.float16).contiguous(),
        zeros=zeros.T.to(torch.uint8).contiguous(),
        group_size=bounds[0][1],
    )
