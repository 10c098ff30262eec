"""Codebooks: where they start, and the best ones for given codes.

The published code starts from k-means and follows the gradient with Adam. For given codes the loss is quadratic in the
codebooks: its minimum is found by conjugate gradients, whose matrix-vector product is one decoding, one product with H
and one sum by code.
"""

import torch
from torch import Tensor

from casp_aqlm.factors import Factors, weighted_loss
from casp_aqlm.linear import decode
from casp_aqlm.nearest import Search
from casp_aqlm.scheme import Scheme

_SAMPLES = 64  # vectors for each entry: more do not make a better start
_LLOYD, _JOINT = 6, 3  # iterations: of one codebook on what the others leave, and of all together
_SOLVED = 1e-8  # of the first residual's energy: below it float32 follows nothing but its own rounding
_LARGEST = 127  # in a byte with a sign
_REACH = (1.0, 0.85, 0.7, 0.55, 0.4)  # of the largest entry, that whole numbers are tried to hold
_RIDGE = 1e-3  # of the mean curvature: keeps the preconditioner off entries that hardly any code uses


def sums_by_code(values: Tensor, codes: Tensor, size: int) -> Tensor:
    """For each codebook and entry the sum of `values` (vectors, g) whose code (vectors, M) it is: (M, size, g)."""
    zeros = values.new_zeros(size, values.shape[1])
    return torch.stack([zeros.index_add(0, codes[:, place], values) for place in range(codes.shape[1])])


def _k_means(vectors: Tensor, weights: Tensor, size: int, search: Search, generator: torch.Generator) -> Tensor:
    """Weighted Lloyd iterations from a draw of the vectors; an entry without any keeps its place."""
    chosen = torch.randperm(len(vectors), generator=generator)[:size]
    chosen = chosen.repeat(-(-size // len(chosen)))[:size].to(vectors.device)
    entries = vectors[chosen]
    for _ in range(_LLOYD):
        codes = search.entries(vectors, entries)[:, None]
        mass = sums_by_code(weights[:, None], codes, size)[0]
        means = sums_by_code(vectors * weights[:, None], codes, size)[0] / mass.clamp_min(1e-30)
        entries = torch.where(mass > 0, means, entries)
    return entries


def first_codebooks(
    target: Tensor, row_weights: Tensor, factors: Factors, scheme: Scheme, search: Search, generator: torch.Generator
) -> Tensor:
    """Residual k-means of the groups of `target` (rows, n), then a few joint iterations: (M, 2^B, g).

    A group weighs as much as its row (row_weights) times the trace of the metric that it is rounded in.
    """
    vectors = target.reshape(-1, scheme.group)
    weights = (row_weights[:, None] * factors.rounding.square().sum((1, 2))).flatten()
    chosen = torch.randperm(len(vectors), generator=generator)[: _SAMPLES * scheme.size].to(target.device)
    vectors, weights = vectors[chosen], weights[chosen] / weights[chosen].mean().clamp_min(1e-30)
    codebooks, left = [], vectors
    for _ in range(scheme.codebooks):
        codebooks.append(_k_means(left, weights, scheme.size, search, generator))
        left = left - codebooks[-1][search.entries(left, codebooks[-1])]
    found = torch.stack(codebooks)
    if scheme.codebooks > 1:
        for _ in range(_JOINT):
            codes = search.sums(vectors, found)
            found = found + _conjugate_gradients(
                lambda change, codes=codes: sums_by_code(
                    decode(codes[:, None], change) * weights[:, None], codes, scheme.size
                ),
                sums_by_code((vectors - decode(codes[:, None], found)) * weights[:, None], codes, scheme.size),
                sums_by_code(weights[:, None], codes, scheme.size),
                iterations=8,
            )
    return found


def _conjugate_gradients(product, right: Tensor, diagonal: Tensor, iterations: int) -> Tensor:
    """`x` with `product(x) = right`, from 0, preconditioned by `diagonal` (broadcast to right's shape)."""
    diagonal = diagonal + _RIDGE * diagonal.mean()
    x, residual = torch.zeros_like(right), right
    scaled = residual / diagonal
    direction, energy = scaled, (residual * scaled).sum()
    enough = _SOLVED * energy
    for _ in range(iterations):
        if energy <= enough:
            break
        image = product(direction)
        curvature = (direction * image).sum()
        if curvature <= 0:
            break
        x, residual = x + energy / curvature * direction, residual - energy / curvature * image
        scaled = residual / diagonal
        old, energy = energy, (residual * scaled).sum()
        direction = scaled + energy / old * direction
    return x


def refit(
    target: Tensor, codes: Tensor, codebooks: Tensor, row_weights: Tensor, factors: Factors, iterations: int
) -> Tensor:
    """Codebooks that lower `sum_r row_weights_r e_r H e_r^T`, e = target - decoded, for the codes as they are.

    target: (rows, n); codes: (rows, groups, M). Each of the `iterations` of conjugate gradients lowers the loss; ten or
    so bring nearly all that the minimum would.
    """
    flat, size = codes.flatten(0, 1), codebooks.shape[1]

    def adjoint(points: Tensor) -> Tensor:
        pull = (points * row_weights[:, None]) @ factors.hessian
        return sums_by_code(pull.view(-1, factors.group), flat, size)

    curvature = (row_weights[:, None] * factors.hessian.diagonal()).view(-1, factors.group)
    right = adjoint(target - decode(codes, codebooks))
    diagonal = sums_by_code(curvature, flat, size)
    return codebooks + _conjugate_gradients(lambda c: adjoint(decode(codes, c)), right, diagonal, iterations)


def in_whole_numbers(
    target: Tensor, codes: Tensor, codebooks: Tensor, row_weights: Tensor, factors: Factors
) -> tuple[Tensor, float]:
    """`codebooks` in a unit in which whole numbers of -127 to 127 hold them best, and that unit.

    Arguments as of `refit`, whose loss decides. A unit too small for the largest entries serves all others better.
    """
    most = codebooks.abs().amax().item() or 1.0

    def loss(unit: float) -> float:
        rounded = (codebooks / unit).round().clamp(-_LARGEST, _LARGEST) * unit
        error = target - decode(codes, rounded)
        return (row_weights * weighted_loss(error, factors.hessian)).sum().item()

    unit = min((reach * most / _LARGEST for reach in _REACH), key=loss)
    return (codebooks / unit).clamp(-_LARGEST, _LARGEST), unit


def best_scales(weight: Tensor, points: Tensor, hessian: Tensor, scales: Tensor) -> Tensor:
    """The scale of each row that minimises its loss `|w - s p|_H^2`: (rows,); the old one where none is positive.

    weight, points: (rows, n).
    """
    image = points @ hessian
    energy = (image * points).sum(1)
    solved = (image * weight).sum(1) / energy
    return torch.where((energy > 0) & (solved > 0) & torch.isfinite(solved), solved, scales)
