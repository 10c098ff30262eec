"""The innermost loops of the search as machine code for CPUs: the best codes of one group, over many rows.

All in one file, because numba compiles anew what it keeps on disk when the function's own file changes, and only then.
Minima are kept for many places at once, elementwise: LLVM turns that into vector instructions, but not a running
minimum. Vectors are padded to a multiple of 4 coordinates.
"""

import numpy as np
from numba import njit

LANES = 256  # entries whose scores are in the first-level cache together; a codebook has a multiple of it, or fewer


@njit(cache=True, nogil=True, fastmath={"contract"})
def _scores(vector, entries, norms, out):
    """`|c|^2 - 2 <vector, c>` of all entries c (g, n), norms (n,), into out (n,)."""
    two = np.float32(-2)
    for j in range(out.shape[0]):
        out[j] = norms[j]
    for a in range(0, vector.shape[0], 4):
        p, q, r, s = two * vector[a], two * vector[a + 1], two * vector[a + 2], two * vector[a + 3]
        w, x, y, z = entries[a], entries[a + 1], entries[a + 2], entries[a + 3]
        for j in range(out.shape[0]):
            out[j] += p * w[j] + q * x[j] + r * y[j] + s * z[j]


@njit(cache=True, nogil=True)
def _smallest_place(scores):
    place = 0
    for j in range(1, scores.shape[0]):
        if scores[j] < scores[place]:
            place = j
    return place


@njit(cache=True, nogil=True)
def nearest_entries(targets, entries, norms, codes):
    """Code of the entry nearest to each target (rows, g), into codes (rows,).

    entries (blocks, g, n), norms (blocks, n): a codebook of blocks x n entries, cut so that a block is contiguous.
    """
    size = norms.shape[1]
    scores, least, block = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.int32)
    for row in range(targets.shape[0]):
        _scores(targets[row], entries[0], norms[0], least)
        block[:] = 0
        for k in range(1, norms.shape[0]):
            _scores(targets[row], entries[k], norms[k], scores)
            where = np.int32(k)
            for j in range(size):
                better = scores[j] < least[j]
                block[j] = where if better else block[j]
                least[j] = scores[j] if better else least[j]
        place = _smallest_place(least)
        codes[row] = block[place] * size + place


@njit(cache=True, nogil=True)
def nearest_pairs(targets, entries, norms, products, codes):
    """Codes of the sum of two entries nearest to each target (rows, g), exactly, into codes (rows, 2).

    entries (2, g, n), norms (2, n); products (n, n): twice the inner product of an entry of the first codebook and one
    of the second. Two targets at a time share what is read of `products`, which the first-level cache does not hold.
    """
    rows, size = targets.shape[0], norms.shape[1]
    first, second = np.empty((2, size), np.float32), np.empty((2, size), np.float32)
    least = np.empty((2, size), np.float32)
    for row in range(0, rows, 2):
        other = min(row + 1, rows - 1)
        for t, at in enumerate((row, other)):
            _scores(targets[at], entries[0], norms[0], first[t])
            _scores(targets[at], entries[1], norms[1], second[t])
        least[:] = np.float32(np.inf)
        here, there = least[0], least[1]
        for i in range(0, size, 4):
            p, q, r, s = first[0, i], first[0, i + 1], first[0, i + 2], first[0, i + 3]
            t, u, v, o = first[1, i], first[1, i + 1], first[1, i + 2], first[1, i + 3]
            w, x, y, z = products[i], products[i + 1], products[i + 2], products[i + 3]
            for j in range(size):
                a, b, c, d = p + w[j], q + x[j], r + y[j], s + z[j]
                a = a if a < b else b
                c = c if c < d else d
                a = a if a < c else c
                here[j] = a if a < here[j] else here[j]
                a, b, c, d = t + w[j], u + x[j], v + y[j], o + z[j]
                a = a if a < b else b
                c = c if c < d else d
                a = a if a < c else c
                there[j] = a if a < there[j] else there[j]
        for t, at in enumerate((row, other)):
            for j in range(size):
                least[t, j] += second[t, j]
            chosen = _smallest_place(least[t])
            for i in range(size):
                first[t, i] += products[i, chosen]
            codes[at, 0] = _smallest_place(first[t])
            codes[at, 1] = chosen
