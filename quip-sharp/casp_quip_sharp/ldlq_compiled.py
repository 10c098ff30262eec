"""The inner loops of LDLQ and of its sweeps as compiled loops over rows, for CPUs.

`casp_quip_sharp.ldlq` holds the same in PyTorch. There each group of 8 columns costs some twenty calls on small
tensors; here one call does all groups of a block, and the rows, which are independent, are shared out among torch's
threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numba import njit
from torch import Tensor

from casp_quip_sharp.codebooks import GROUP, STAGES, UNIT, table
from casp_quip_sharp.search_compiled import TABLES, nearest_e8p_one

_LEAST_ROWS = 32  # for a thread: fewer are not worth waking it


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


@njit(cache=True, nogil=True)
def _nearest_listed(vector, points):
    """Code of the point of `points` (n, 8) nearest to `vector` (8,)."""
    best, code, two = np.float32(np.inf), 0, np.float32(2)
    for k in range(points.shape[0]):
        score = np.float32(0)
        for i in range(8):
            score += points[k, i] * (points[k, i] - two * vector[i])
        if score < best:
            best, code = score, k
    return code


@njit(cache=True, nogil=True)
def _nearest(wanted, point, codes, stages, tables, size, order, top, left):
    """Put the codes of the point nearest to `wanted` (8,), stage after stage, in `codes` and itself in `point`."""
    first, second, lattice, scales = stages
    for i in range(8):
        point[i] = 0
    for stage in range(len(scales)):
        for i in range(8):
            left[i] = (wanted[i] - point[i]) / scales[stage]
        listed = first if stage == 0 else second
        code = nearest_e8p_one(left, tables, size, order, top) if lattice[stage] else _nearest_listed(left, listed)
        codes[stage] = code
        for i in range(8):
            point[i] += scales[stage] * listed[code, i]


@njit(cache=True, nogil=True, fastmath={"contract"})
def _add_product(row, factors, rows, end):
    """Add `factors @ rows` of (8,) and (8, n) to the first `end` entries of `row`, a multiple of 8."""
    a, b, c, d = factors[0], factors[1], factors[2], factors[3]
    e, f, g, h = factors[4], factors[5], factors[6], factors[7]
    r, s, t, u, v, w, x, y = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7]
    for j in range(end):
        row[j] += a * r[j] + b * s[j] + c * t[j] + d * u[j] + e * v[j] + f * w[j] + g * x[j] + h * y[j]


@njit(cache=True, nogil=True, fastmath={"contract"})
def _round_rows(wanted, target, feedback, stages, tables, codes, points):
    size, order, top = np.empty(8), np.empty(8, np.int64), np.zeros(9)
    left, error = np.empty(8, np.float32), np.empty(8, np.float32)
    width = wanted.shape[1]
    for row in range(wanted.shape[0]):
        for first in range(width - 8, -1, -8):
            group, point = wanted[row, first : first + 8], points[row, first : first + 8]
            _nearest(group, point, codes[row, first // 8], stages, tables, size, order, top, left)
            for i in range(8):
                error[i] = target[row, first + i] - point[i]
            _add_product(wanted[row], error, feedback[first : first + 8], first)


@njit(cache=True, nogil=True, fastmath={"contract"})
def _descend_rows(gradient, hessian, inverse, stages, tables, codes, points, moves):
    size, order, top = np.empty(8), np.empty(8, np.int64), np.zeros(9)
    left, wanted = np.empty(8, np.float32), np.empty(8, np.float32)
    taken = np.empty(8, np.float32)
    candidate, found = np.empty(8, np.float32), np.empty(len(stages[3]), np.uint16)
    width = gradient.shape[1]
    for row in range(gradient.shape[0]):
        for first in range(width - 8, -1, -8):
            point, move = points[row, first : first + 8], moves[row, first : first + 8]
            pull = gradient[row, first : first + 8]
            for i in range(8):
                wanted[i] = point[i]
                for j in range(8):
                    wanted[i] += pull[j] * inverse[first // 8, j, i]
            _nearest(wanted, candidate, found, stages, tables, size, order, top, left)
            gain = np.float32(0)
            for i in range(8):
                move[i] = candidate[i] - point[i]
            for i in range(8):
                curved = np.float32(2) * pull[i]
                for j in range(8):
                    curved -= move[j] * hessian[first + j, first + i]
                gain += move[i] * curved
            if gain > 0:
                for i in range(8):
                    point[i] = candidate[i]
                codes[row, first // 8, :] = found
                for i in range(8):
                    taken[i] = -move[i]
                _add_product(gradient[row], taken, hessian[first : first + 8], first)
            else:
                move[:] = 0


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _over_rows(function: Callable[[slice], None], rows: int) -> None:
    """Call `function` on slices of the rows, in as many threads as torch uses."""
    threads = min(torch.get_num_threads(), rows // _LEAST_ROWS)
    if threads < 2:
        function(slice(0, rows))
        return
    bounds = [rows * part // threads for part in range(threads + 1)]
    slices = [slice(begin, end) for begin, end in pairwise(bounds)]
    for _ in _pool(threads).map(function, slices):
        pass


def _stored(codes: np.ndarray, bits: int) -> list[Tensor]:
    """Codes (rows, groups, stages) uint16 as one tensor (rows, groups) for each stage, of its dtype."""
    parts = (np.ascontiguousarray(codes[..., stage]) for stage in range(codes.shape[-1]))
    return [
        torch.from_numpy(part.view(np.int16)).to(stage.dtype) for part, stage in zip(parts, STAGES[bits], strict=True)
    ]


def round_block_compiled(wanted: Tensor, target: Tensor, feedback: Tensor, bits: int) -> tuple[list[Tensor], Tensor]:
    """As `casp_quip_sharp.ldlq.round_block`, on the CPU."""
    stages = _stages(bits)
    rows, width = wanted.shape
    moving, goal, factor = (x.numpy() for x in (wanted.clone(), target.contiguous(), feedback.contiguous()))
    codes, points = np.empty((rows, width // GROUP, len(stages[-1])), np.uint16), np.empty((rows, width), np.float32)
    _over_rows(lambda at: _round_rows(moving[at], goal[at], factor, stages, TABLES, codes[at], points[at]), rows)
    return _stored(codes, bits), torch.from_numpy(points)


def descend_block_compiled(
    gradient: Tensor, hessian: Tensor, inverse: Tensor, codes: list[Tensor], points: Tensor, bits: int
) -> tuple[list[Tensor], Tensor]:
    """As `casp_quip_sharp.ldlq.descend_block`, on the CPU."""
    stages = _stages(bits)
    pull, curvature, solve = (x.numpy() for x in (gradient.clone(), hessian.contiguous(), inverse.contiguous()))
    mine = np.stack([code.numpy().astype(np.uint16) for code in codes], -1)
    place = points.contiguous().clone().numpy()
    moves = np.empty_like(place)
    _over_rows(
        lambda at: _descend_rows(pull[at], curvature, solve, stages, TABLES, mine[at], place[at], moves[at]),
        len(place),
    )
    return _stored(mine, bits), torch.from_numpy(moves)
