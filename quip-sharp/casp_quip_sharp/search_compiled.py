"""The search of `casp_quip_sharp.search` for E8P12 as one compiled loop over vectors, for CPUs."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from casp_quip_sharp.codebooks import SHORT, half_patterns, pattern_index

_POWERS = 3 ** np.arange(8)
# For each pattern of norm^2 12 the three places that hold 1/2; the other five hold 3/2.
_HALVES = np.array([np.flatnonzero(pattern == 0.5) for pattern in half_patterns()[SHORT:]])


# What a search needs besides the vector, made once: patterns by key, powers of 3, places of the halves.
TABLES = (pattern_index(), _POWERS, _HALVES)


@njit(cache=True, nogil=True)
def nearest_e8p_one(vector, tables, size, order, top):
    """Code of the point nearest to `vector` (8,); size (8,), order (8,) int64, top (9,) with top[0] = 0: scratch."""
    index, powers, halves = tables
    code, best_of_shifts = 0, np.inf
    for shift in range(2):
        signs, negatives, norm, total = 0, 0, 0.0, 0.0
        for i in range(8):
            u = vector[i] + (0.25 if shift else -0.25)
            if u < 0:
                signs |= 1 << i
                negatives += 1
                u = -u
            size[i] = u
            norm += u * u
            total += u
            at = i
            while at > 0 and size[order[at - 1]] < u:
                order[at] = order[at - 1]
                at -= 1
            order[at] = i
        for i in range(6):
            top[i + 1] = top[i] + size[order[i]]
        odd = negatives & 1
        smallest = size[order[7]]

        best, threes, fives = np.inf, 0, 0
        for five in range(2):
            for three in range(2 if five else 5):
                inner = 0.5 * total + top[three + five] + top[five]
                if odd != three & 1:
                    inner -= smallest
                score = 2 + 2 * three + 6 * five - 2 * inner
                if score < best:
                    best, threes, fives = score, three, five
        pattern = -1
        if 12 - 2 * (0.5 * total + top[5]) < best:
            flip = 0
            for k in range(halves.shape[0]):
                a, b, c = halves[k, 0], halves[k, 1], halves[k, 2]
                inner = 1.5 * total - size[a] - size[b] - size[c]
                where = a
                if odd == 0:
                    where = a if size[a] <= size[b] else b
                    where = where if size[where] <= size[c] else c
                    repair = 0.5 * size[where]
                    for i in range(8):
                        if i != a and i != b and i != c and 1.5 * size[i] < repair:
                            repair, where = 1.5 * size[i], i
                    inner -= 2 * repair
                score = 12 - 2 * inner
                if score < best:
                    best, pattern, flip = score, 227 + k, where
            if pattern >= 0 and odd == 0:
                signs ^= 1 << flip
        if best + norm < best_of_shifts:
            best_of_shifts = best + norm
            if pattern < 0:
                key = 0
                for i in range(threes + fives):
                    key += powers[order[i]] * (2 if i < fives else 1)
                pattern = index[key]
                if odd != threes & 1:
                    signs ^= 1 << order[7]
            code = pattern | (signs & 127) << 8 | shift << 15
    return code


@njit(cache=True, nogil=True)
def _nearest_e8p(vectors, tables, codes):
    size, order, top = np.empty(8), np.empty(8, np.int64), np.zeros(9)
    for n in range(vectors.shape[0]):
        codes[n] = nearest_e8p_one(vectors[n], tables, size, order, top)


def nearest_e8p_compiled(vectors: Tensor) -> Tensor:
    """Codes (n,) int16 of the nearest points of E8P12 to `vectors` (n, 8) float32 on the CPU."""
    codes = np.empty(len(vectors), dtype=np.uint16)
    _nearest_e8p(vectors.float().contiguous().numpy(), TABLES, codes)
    return torch.from_numpy(codes.view(np.int16))
