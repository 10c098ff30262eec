"""The loops of QuIP#'s rounding as machine code for CPUs: nearest point, LDLQ, sweeps.

All in one file, because numba compiles anew what it keeps on disk when the function's own file changes, and only then.
"""

import numpy as np
from numba import njit

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
            negative = u < 0
            signs |= negative << i
            negatives += negative
            size[i] = abs(u)
            norm += u * u
            total += size[i]
        if not norm < np.inf:  # no order among NaN: the places below would lie anywhere
            return 0
        for i in range(8):  # counting the larger ones takes no branches, unlike any sort of eight numbers
            place = 0
            for j in range(8):
                place += (size[j] > size[i]) | ((size[j] == size[i]) & (j < i))
            order[place] = i
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
def nearest_e8p(vectors, tables, codes):
    size, order, top = np.empty(8), np.empty(8, np.int64), np.zeros(9)
    for n in range(vectors.shape[0]):
        codes[n] = nearest_e8p_one(vectors[n], tables, size, order, top)


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
def round_rows(wanted, target, feedback, stages, tables, codes, points):
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
def descend_rows(gradient, hessian, inverse, stages, tables, codes, points, moves):
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
