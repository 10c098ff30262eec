"""The inner loops of LDLQ and of its sweeps as compiled loops over rows, for CPUs.

`casp_quip_sharp.search` holds the same in PyTorch. There each group of 8 columns costs some twenty calls on small
tensors; here one call does all groups of a block, and the rows, which are independent, are shared out among torch's
threads.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from casp.threads import over_rows
from casp_quip_sharp.codebooks import GROUP, STAGES, UNIT, table
from casp_quip_sharp.loops import TABLES, descend_rows, round_rows


@cache
def _points(codebook: str) -> np.ndarray:
    """All points of a codebook by code, (n, 8) float32."""
    return table(codebook).numpy().astype(np.float32) * np.float32(UNIT)


@cache
def _stages(bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What the loops need of a format: points of its first and its last stage, which are E8P12, and their scales."""
    stages = STAGES[bits]
    tables = [_points(stage.codebook) for stage in stages]
    lattice = np.array([stage.codebook == "e8p" for stage in stages])
    scales = np.array([stage.scale for stage in stages], dtype=np.float32)
    return tables[0], tables[-1], lattice, scales


def _stored(codes: np.ndarray, bits: int) -> list[Tensor]:
    """Codes (rows, groups, stages) uint16 as one tensor (rows, groups) for each stage, of its dtype."""
    parts = (np.ascontiguousarray(codes[..., stage]) for stage in range(codes.shape[-1]))
    return [
        torch.from_numpy(part.view(np.int16)).to(stage.dtype) for part, stage in zip(parts, STAGES[bits], strict=True)
    ]


def round_block_compiled(wanted: Tensor, target: Tensor, feedback: Tensor, bits: int) -> tuple[list[Tensor], Tensor]:
    """As `round_block_reference`, on the CPU."""
    stages = _stages(bits)
    rows, width = wanted.shape
    moving, goal, factor = (x.numpy() for x in (wanted.clone(), target.contiguous(), feedback.contiguous()))
    codes, points = np.empty((rows, width // GROUP, len(stages[-1])), np.uint16), np.empty((rows, width), np.float32)
    over_rows(lambda at: round_rows(moving[at], goal[at], factor, stages, TABLES, codes[at], points[at]), rows)
    return _stored(codes, bits), torch.from_numpy(points)


def descend_block_compiled(
    gradient: Tensor, hessian: Tensor, inverse: Tensor, codes: list[Tensor], points: Tensor, bits: int
) -> tuple[list[Tensor], Tensor]:
    """As `descend_block_reference`, on the CPU."""
    stages = _stages(bits)
    pull, curvature, solve = (x.numpy() for x in (gradient.clone(), hessian.contiguous(), inverse.contiguous()))
    mine = np.stack([code.numpy().astype(np.uint16) for code in codes], -1)
    place = points.contiguous().clone().numpy()
    moves = np.empty_like(place)
    over_rows(
        lambda at: descend_rows(pull[at], curvature, solve, stages, TABLES, mine[at], place[at], moves[at]),
        len(place),
    )
    return _stored(mine, bits), torch.from_numpy(moves)
