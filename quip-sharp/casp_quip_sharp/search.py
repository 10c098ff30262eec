"""Exact nearest points of the codebooks, without comparing a vector with all 65,536 points of E8P12.

For a given shift, a vector u = v -+ 1/4 and a pattern p of absolute values, the best signs are those of u; where
these make the sum odd, the cheapest repair is to flip one sign, the one of smallest |u_i| p_i. All permutations of
the 227 short patterns are in the codebook, so within a class (how many 5/2, how many 3/2, the rest 1/2) the best
pattern gives the largest values to the largest |u_i|: 7 classes on sorted coordinates instead of 227 patterns. Only the
29 patterns of norm^2 12 are compared one by one, and only for vectors that a full class of them would serve better.
"""

from functools import cache

import torch
from torch import Tensor

from casp_quip_sharp.codebooks import GROUP, SHORT, STAGES, UNIT, decode, half_patterns, pattern_index, table
from casp_quip_sharp.search_compiled import nearest_e8p_compiled

# Classes of short patterns: number of 3/2 and of 5/2.
THREES, FIVES = (0, 1, 2, 3, 4, 0, 1), (0, 0, 0, 0, 0, 1, 1)
_CHUNK = 1 << 16  # vectors searched at once


@cache
def _on(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pattern index, the patterns of norm^2 12 and the powers of 3, as tensors on `device`."""
    powers = torch.tensor([3**i for i in range(GROUP)], dtype=torch.int64, device=device)
    padding = torch.from_numpy(half_patterns()[SHORT:]).to(device)
    return torch.from_numpy(pattern_index()).to(device), padding, powers


def _nearest_half_point(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest point of E8P12's half-integer points to u (n, 8).

    Returns its absolute values less 1/2 (n, 8) int64, which coordinates are negative (n, 8) bool, and its squared
    distance (n,).
    """
    _, padding, _ = _on(u.device)
    size, negative = u.abs(), u < 0
    odd = negative.sum(1) % 2 == 1
    ordered, order = size.sort(dim=1, descending=True)
    top = torch.cat([torch.zeros_like(size[:, :1]), ordered.cumsum(1)], 1)  # sums of the k largest
    half, smallest = 0.5 * top[:, GROUP], ordered[:, -1]

    scores = []
    for threes, fives in zip(THREES, FIVES, strict=True):
        inner = half + top[:, threes + fives] + top[:, fives]
        wrong = odd != bool(threes % 2)
        scores.append(2 + 2 * threes + 6 * fives - 2 * (inner - wrong * smallest))
    score, kind = torch.stack(scores, 1).min(1)
    threes, fives = (torch.tensor(counts, device=u.device)[kind] for counts in (THREES, FIVES))
    rank = torch.arange(GROUP, device=u.device)
    steps = (rank < (threes + fives)[:, None]).long() + (rank < fives[:, None]).long()
    values = torch.empty_like(steps).scatter_(1, order, steps)
    flip = torch.where(odd != (threes % 2 == 1), order[:, -1], -1)

    long = (12 - 2 * (half + top[:, 5]) < score).nonzero()[:, 0]
    if len(long):
        patterns = padding.to(u.dtype)
        mine = size[long]
        products = mine[:, None] * patterns  # (long, 29, 8)
        repair, where = products.min(2)
        wrong = ~odd[long]
        costs = 12 - 2 * (products.sum(2) - 2 * repair * wrong[:, None])
        cost, best = costs.min(1)
        better = cost < score[long]
        chosen, best = long[better], best[better]
        score[chosen] = cost[better]
        values[chosen] = (padding[best] - 0.5).long()
        flip[chosen] = torch.where(wrong[better], where[better, best], -1)

    flipped = (flip >= 0).nonzero()[:, 0]
    negative[flipped, flip[flipped]] ^= True
    return values, negative, score + (size * size).sum(1)


def nearest_e8p_reference(vectors: Tensor) -> Tensor:
    """Codes (n,) int16 of the nearest points of E8P12 to `vectors` (n, 8) float, on any device."""
    index, _, powers = _on(vectors.device)
    bits = 1 << torch.arange(8, 15, device=vectors.device)
    candidates = []
    for shift, code in ((UNIT, 0), (-UNIT, 1 << 15)):
        values, negative, distance = _nearest_half_point(vectors - shift)
        pattern = index[(values * powers).sum(1)].long()
        candidates.append((pattern + (negative[:, :7] * bits).sum(1) + code, distance))
    (plus, near), (minus, far) = candidates
    return torch.where(near <= far, plus, minus).to(torch.int16)


def nearest_e8(vectors: Tensor) -> Tensor:
    """Codes (n,) uint8 of the nearest points of the small E8 codebook to `vectors` (n, 8) float."""
    points = table("e8", vectors.device).to(vectors.dtype) * UNIT
    return torch.addmm((points * points).sum(1), vectors, points.T, alpha=-2).argmin(1).to(torch.uint8)


def nearest_e8p(vectors: Tensor) -> Tensor:
    """Codes (n,) int16 of the nearest points of E8P12 to `vectors` (n, 8) float; compiled on a CPU."""
    if vectors.device.type == "cpu":
        return nearest_e8p_compiled(vectors)
    return nearest_e8p_reference(vectors)


def quantize_vectors(vectors: Tensor, bits: int) -> tuple[list[Tensor], Tensor]:
    """Codes of every stage of the format, each (n,), and the points that they stand for (n, 8) float32.

    vectors: (n, 8) float32 in units of the matrix's scale.
    """
    codes, points = [], torch.zeros_like(vectors)
    for stage in STAGES[bits]:
        search = {"e8p": nearest_e8p, "e8": nearest_e8}[stage.codebook]
        found = torch.cat([search(part) for part in ((vectors - points) / stage.scale).split(_CHUNK)])
        codes.append(found)
        points = points + decode(found, stage)
    return codes, points


def round_block_reference(wanted: Tensor, target: Tensor, feedback: Tensor, bits: int) -> tuple[list[Tensor], Tensor]:
    """Codes (rows, width / 8) of every stage and points (rows, width) of a block of columns, last group first.

    wanted, target: (rows, width), with and without the feedback of the blocks that are done; feedback: A within the
    block, (width, width).
    """
    width = target.shape[1]
    error, codes = torch.zeros_like(target), []
    for first in range(width - GROUP, -1, -GROUP):
        last = first + GROUP
        found, points = quantize_vectors(wanted[:, first:last] + error[:, last:] @ feedback[last:, first:last], bits)
        error[:, first:last] = target[:, first:last] - points
        codes.append(found)
    return [torch.stack(stage[::-1], 1) for stage in zip(*codes, strict=True)], target - error


def descend_block_reference(
    gradient: Tensor, hessian: Tensor, inverse: Tensor, codes: list[Tensor], points: Tensor, bits: int
) -> tuple[list[Tensor], Tensor]:
    """New codes of a block of columns and how far its points move, (rows, width); last group first.

    gradient: E H of the block, (rows, width); hessian: (width, width); inverse: of its groups of 8, (width / 8, 8, 8);
    codes and points: as they are, not changed.
    """
    codes, moves = [stage.clone() for stage in codes], torch.zeros_like(points)
    for first in range(points.shape[1] - GROUP, -1, -GROUP):
        last, k = first + GROUP, first // GROUP
        pull = gradient[:, first:last] - moves[:, last:] @ hessian[last:, first:last]
        found, candidate = quantize_vectors(points[:, first:last] + pull @ inverse[k], bits)
        move = candidate - points[:, first:last]
        better = (move * (2 * pull - move @ hessian[first:last, first:last])).sum(1) > 0
        moves[:, first:last] = move * better[:, None]
        for stage, code in zip(codes, found, strict=True):
            stage[:, k] = torch.where(better, code, stage[:, k])
    return codes, moves
