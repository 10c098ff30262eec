"""The affine grid of one group of weights: `weight ~ scale * (code - zero)`, code and zero in 0 .. 2^bits - 1.

Its range comes from the group's minimum and maximum (Frantar et al. 2022, arXiv 2210.17323, section 4) and is
then shrunk: at few bits it pays to clip the largest weights for a finer step.
"""

from functools import cache

import torch
from torch import Tensor

from casp.errors import UserError

BITS = (2, 3, 4, 8)
# Scales are stored as float16; below its smallest normal number (a group of zeros) they would lose their digits.
SMALLEST_SCALE = torch.finfo(torch.float16).tiny
LARGEST_SCALE = torch.finfo(torch.float16).max
_SMALLEST_RANGE = 0.2  # the clip search ends at this share of the full range
_SAMPLE = 1 << 16  # numbers whose error is a grid's distortion
_STRIDES = (4, 2, 1)  # every fourth range first, then those beside the best so far


def check_format(bits: int, group_size: int) -> None:
    """UserError unless there is a grid of `bits` bits and groups of `group_size` columns (-1: the whole row)."""
    if bits not in BITS:
        raise UserError(f"GPTQ stores 2, 3, 4 or 8 bits a weight, not {bits}; choose one of them with --bits.")
    if group_size != -1 and group_size < 1:
        raise UserError(
            f"groups of {group_size} columns are impossible; give --group-size 1 or more, or -1 for whole rows."
        )


def group_bounds(columns: int, group_size: int) -> list[tuple[int, int]]:
    """First and last-plus-one column of every group; the last group is short when the size does not divide."""
    size = columns if group_size == -1 else min(group_size, columns)
    return [(start, min(start + size, columns)) for start in range(0, columns, size)]


def to_codes(values: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The nearest codes, as floats; `scales` and `zeros` broadcast against `values`."""
    return (values / scales).add_(zeros).round_().clamp_(0, 2**bits - 1)


def stored_scales(scales: Tensor) -> Tensor:
    """`scales` rounded to what the checkpoint holds (float16), in their own dtype: what encodes also decodes."""
    return scales.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16).to(scales.dtype)


def find_grid(
    values: Tensor, bits: int, symmetric: bool, clip_steps: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best grid for each row of a group.

    values: (rows, columns) float; importance: (columns,) weights of the squared errors, None for equal ones.
    clip_steps: steps of the shrinking (0: plain minimum and maximum); the best of them is looked for coarse to
    fine, which finds that of all steps or one hardly worse.
    A symmetric grid has its zero at 2^(bits-1). An asymmetric one takes the zero that its range asks for;
    at 2 and 3 bits, where the zero decides which side loses a level, the neighbouring zeros compete too.

    Returns scales (float16 numbers) and zeros (whole numbers), both (rows,) in the dtype of `values`.
    """
    top = 2**bits - 1
    low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)  # 0 itself stays on the grid
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    full = ((high - low) / top).clamp(min=SMALLEST_SCALE)
    middle = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / full).round().clamp(0, top)
    shifts = (0, -1, 1) if bits <= 3 and not symmetric and clip_steps else (0,)

    columns = values.T.contiguous()  # (columns, rows): limits that differ by row then lie along the inner dimension
    error = torch.empty_like(columns)
    best_cost, best_step = torch.full_like(low, torch.inf), torch.zeros_like(low)
    best_scales, best_zeros = stored_scales(full), middle

    def compete(steps: Tensor) -> None:
        """Each row takes the range of its own of `steps` where that costs less than its best so far."""
        nonlocal best_cost, best_scales, best_zeros, best_step
        scales = stored_scales(full * (1 - (1 - _SMALLEST_RANGE) * steps / max(clip_steps, 1)))
        scaled = columns / scales
        whole = scaled.round()
        for shift in shifts:
            zeros = (middle + shift).clamp(0, top)
            torch.clamp(whole, -zeros, top - zeros, out=error).sub_(scaled).square_()
            cost = (error.sum(0) if importance is None else importance @ error) * scales.square()
            better = cost < best_cost
            best_cost = torch.where(better, cost, best_cost)
            best_scales = torch.where(better, scales, best_scales)
            best_zeros = torch.where(better, zeros, best_zeros)
            best_step = torch.where(better, steps, best_step)

    for step in range(0, clip_steps + 1, _STRIDES[0]):
        compete(torch.full_like(low, step))
    for stride in _STRIDES[1:] if clip_steps else ():
        centre = best_step
        for neighbours in (centre - stride, centre + stride):
            compete(neighbours.clamp(0, clip_steps))
    return best_scales, best_zeros


@cache
def gaussian_distortion(bits: int, columns: int, clip_steps: int) -> float:
    """Mean squared error of numbers from N(0, 1), so many `columns` of which share a grid of `find_grid`.

    Of a sample of 65,536 or more that is always the same, to three digits: they are the same on every machine.
    """
    rows = max(_SAMPLE // columns, 64)
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    scales, zeros = (part[:, None] for part in find_grid(values, bits, False, clip_steps))
    error = values - (to_codes(values, scales, zeros, bits) - zeros) * scales
    return float(f"{error.square().mean().item():.3g}")
