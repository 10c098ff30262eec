"""The codebooks of QuIP#, made from the definition of the lattice E8 (arXiv 2402.04396, section 4).

E8 is the union of D8 (whole coordinates, even sum) and D8 + 1/2. E8P12 holds 65,536 points of E8 + 1/4, which is the
union of D^ + 1/4 and D^ - 1/4 with D^ = D8 + 1/2: half-integer points of even sum. A point of D^ is told by the
absolute values of its coordinates, one of 256 patterns (the 227 of norm^2 up to 10 and 29 of norm^2 12), and by its
signs; the last sign follows from the others, since the sum is even. So a code of 16 bits is

    bits 0-7   pattern
    bits 8-14  signs of coordinates 0 to 6, 1 = negative
    bit 15     shift, 0 = +1/4, 1 = -1/4

The small codebook has 256 points of E8 itself, 8 bits: the origin, the 240 shortest vectors and 15 of the next norm.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import numpy as np
import torch
from torch import Tensor

GROUP = 8  # weights to a code
UNIT = 0.25  # all coordinates are whole multiples of it
SHORT = 227  # half-integer patterns of norm^2 up to 10; they come first


@cache
def half_patterns() -> np.ndarray:
    """The absolute values of E8P12's half-integer points, (256, 8) float64.

    Of the 224 patterns of norm^2 12 those 28 with 3/2 at five places and 1/2 at three places of even sum, and one
    more: no coordinate is favoured much.
    """
    short = [p for p in product((0.5, 1.5, 2.5), repeat=GROUP) if sum(x * x for x in p) <= 10]
    places = sorted(combinations(range(GROUP), 3), key=lambda three: (sum(three) % 2, three))
    padding = [[0.5 if i in three else 1.5 for i in range(GROUP)] for three in places[: 256 - SHORT]]
    return np.array(short + padding)


@cache
def pattern_index() -> np.ndarray:
    """Pattern number by `sum(3^i * (p_i - 1/2))`, (6561,) int16; -1 where there is none."""
    index = np.full(3**GROUP, -1, dtype=np.int16)
    keys = ((half_patterns() - 0.5) @ 3 ** np.arange(GROUP)).astype(np.int64)
    index[keys] = np.arange(len(keys))
    return index


def odd_negatives(patterns: np.ndarray) -> np.ndarray:
    """Whether a point with these absolute values (..., 8) needs an odd number of negative coordinates, (...) bool.

    Its sum must be even, and each negative sign changes the sum by an odd number.
    """
    return patterns.sum(-1) % 2 == 1


@cache
def _e8p_table() -> np.ndarray:
    """All points of E8P12 in units of 1/4, (65536, 8) int8, in the order of their codes."""
    code = np.arange(2**16)
    patterns = half_patterns()
    pattern, signs, shift = code & 255, code >> 8 & 127, code >> 15
    negative = signs[:, None] >> np.arange(7) & 1
    last = (negative.sum(1) + odd_negatives(patterns)[pattern]) % 2
    flips = 1 - 2 * np.concatenate([negative, last[:, None]], 1)
    points = patterns[pattern] * flips + np.where(shift, -0.25, 0.25)[:, None]
    return (points / UNIT).astype(np.int8)


@cache
def _e8_table() -> np.ndarray:
    """The small codebook in units of 1/4, (256, 8) int8."""
    whole = [p for p in product((0, 1, -1), repeat=GROUP) if sum(map(abs, p)) == 2]
    halves = [p for p in product((0.5, -0.5), repeat=GROUP) if sum(p) % 2 == 0]
    axes = [tuple(2 * sign if i == axis else 0 for i in range(GROUP)) for axis in range(GROUP) for sign in (1, -1)]
    points = [(0,) * GROUP, *whole, *halves, *axes[:15]]
    return (np.array(points) / UNIT).astype(np.int8)


@cache
def table(name: str, device: torch.device | str = "cpu") -> Tensor:
    """All points of the codebook "e8p" or "e8" in units of 1/4, (65536 or 256, 8) int8, by code."""
    return torch.from_numpy({"e8p": _e8p_table, "e8": _e8_table}[name]()).to(device)


@dataclass(frozen=True)
class Stage:
    """One codebook of a format: its name, the dtype of a code, and its scale relative to the matrix's scale."""

    codebook: str
    dtype: torch.dtype
    scale: float


STAGES: dict[int, tuple[Stage, ...]] = {
    1: (Stage("e8", torch.uint8, 1.0),),
    2: (Stage("e8p", torch.int16, 1.0),),
    3: (Stage("e8p", torch.int16, 1.0), Stage("e8", torch.uint8, 31 / 64)),
    4: (Stage("e8p", torch.int16, 1.0), Stage("e8p", torch.int16, 1 / 4)),
}
"""Bits per weight -> its codebooks, the second quantizing what the first leaves."""

GAUSSIAN_SCALE = {1: 1.65, 2: 0.965, 3: 1.015, 4: 1.12}
"""The scale at which a format has the least mean squared error on N(0, 1)."""

DISTORTION = {1: 0.319, 2: 0.0914, 3: 0.0296, 4: 0.0084}
"""That error."""


def decode(codes: Tensor, stage: Stage) -> Tensor:
    """Points of `codes` (...,) of the stage's dtype, relative scale included: (..., 8) float32."""
    # int16 holds codes of 16 bits, those above 32767 as negative numbers.
    index = codes.to(torch.int32) & 0xFFFF
    points = table(stage.codebook, codes.device)[index.flatten()].view(*codes.shape, GROUP)
    return points.float().mul_(UNIT * stage.scale)
