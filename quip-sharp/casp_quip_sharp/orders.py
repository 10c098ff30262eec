"""Hadamard matrices of small order: entries +-1, `A A^T = n I`.

Orders 1 and 2; Paley's two constructions over a finite field GF(q), q an odd prime power (R. Paley, J. Math. Phys.
12, 1933): I gives q + 1 for q = 3 mod 4, II gives 2 (q + 1) for q = 1 mod 4; and four symmetric circulants in
Williamson's array (Duke Math. J. 11, 1944) for orders that both leave out.
"""

from functools import cache

import numpy as np

from casp.errors import UserError

LARGEST_ORDER = 512  # matrices are built and applied as dense ones; beyond this another transform is cheaper

# Order / 4 = n -> the four first rows; bit i of each is set where entries i + 1 and n - i - 1 are -1 (entry 0 is +1).
_WILLIAMSON = {23: (412, 339, 1819, 43)}


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k, rest = 0, q
    while p > 1 and rest % p == 0:
        k, rest = k + 1, rest // p
    return (p, k) if rest == 1 and k else None


def _squares(p: int, k: int) -> np.ndarray:
    """Which elements of GF(p^k) are squares other than 0, (q,) bool; element = its digits in base p.

    The field is Z_p[x] modulo a monic polynomial of degree k. Irreducible are exactly those modulo which no
    element but 0 has the square 0 and just half of the other elements are squares.
    """
    q = p**k
    digits = np.stack([np.arange(q) // p**i % p for i in range(k)], 1)
    square = np.zeros((q, 2 * k - 1), dtype=np.int64)
    for i in range(k):
        for j in range(k):
            square[:, i + j] += digits[:, i] * digits[:, j]
    for tail in digits:  # x^k = -tail
        reduced = square.copy()
        for power in range(2 * k - 2, k - 1, -1):
            reduced[:, power - k : power] -= reduced[:, power : power + 1] * tail
            reduced %= p
        values = (reduced[:, :k] % p) @ p ** np.arange(k)
        found = np.zeros(q, dtype=bool)
        found[values[1:]] = True
        if not found[0] and found.sum() == (q - 1) // 2:
            return found
    raise ArithmeticError(f"no irreducible polynomial of degree {k} over GF({p})")


def jacobsthal(q: int) -> np.ndarray:
    """(q, q) int8 matrix of the quadratic character of a - b over GF(q), q an odd prime power."""
    p, k = prime_power(q)
    elements = np.arange(q)
    difference = np.zeros((q, q), dtype=np.int64)
    for i in range(k):
        digit = elements // p**i % p
        difference += (digit[:, None] - digit[None, :]) % p * p**i
    character = np.where(_squares(p, k), 1, -1)
    character[0] = 0
    return character[difference].astype(np.int8)


def _bordered(q: int, left: int) -> np.ndarray:
    """Jacobsthal's matrix under a row of ones, beside a column of `left`."""
    matrix = np.zeros((q + 1, q + 1), dtype=np.int8)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1, left, jacobsthal(q)
    return matrix


def _paley_one(order: int) -> np.ndarray:
    return np.eye(order, dtype=np.int8) + _bordered(order - 1, -1)


def _paley_two(order: int) -> np.ndarray:
    symmetric = _bordered(order // 2 - 1, 1)
    identity = np.eye(order // 2, dtype=np.int8)
    off = np.array([[1, 1], [1, -1]], dtype=np.int8)
    on = np.array([[1, -1], [-1, -1]], dtype=np.int8)
    return np.kron(symmetric, off) + np.kron(identity, on)


def _williamson(order: int) -> np.ndarray:
    n = order // 4
    blocks = []
    for bits in _WILLIAMSON[n]:
        row = np.ones(n, dtype=np.int8)
        for i in range((n - 1) // 2):
            if bits >> i & 1:
                row[[i + 1, n - i - 1]] = -1
        blocks.append(row[(np.arange(n)[None, :] - np.arange(n)[:, None]) % n])
    a, b, c, d = blocks
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def _odd_prime_power(q: int, residue: int) -> bool:
    return q % 4 == residue and prime_power(q) is not None


def construction(order: int) -> str | None:
    """How `hadamard_matrix` builds this order; None where it cannot."""
    if order in (1, 2):
        return "sylvester"
    if order % 4 or order > LARGEST_ORDER:
        return None
    if _odd_prime_power(order - 1, 3):
        return "paley-1"
    if _odd_prime_power(order // 2 - 1, 1):
        return "paley-2"
    return "williamson" if order // 4 in _WILLIAMSON else None


@cache
def hadamard_matrix(order: int) -> np.ndarray:
    """The Hadamard matrix of this order, (order, order) int8, read-only; UserError where none can be built."""
    kind = construction(order)
    if kind is None:
        raise UserError(f"no Hadamard matrix of order {order} is known here; see casp_quip_sharp.orders.construction.")
    builders = {"paley-1": _paley_one, "paley-2": _paley_two, "williamson": _williamson}
    if kind == "sylvester":
        matrix = np.array([[1, 1], [1, -1]], dtype=np.int8)[:order, :order]
    else:
        matrix = builders[kind](order)
    matrix.flags.writeable = False
    return matrix
