"""Calibration data mixed from several sets by shares, "NAME:SHARE,NAME:SHARE", and the built-in names for sets.

What a model is calibrated on decides what it keeps: on validation texts, at 2 bits and not fine-tuned, `demo-llama`
loses 1.40 nats calibrated on speeches alone and 0.69 on as many samples of five registers, `demo-llava` 3.09 on chats
alone and 1.33 with a window of text to twelve of them, its answers hardly anything (docs/calibration.md).
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

from casp.errors import UserError

T = TypeVar("T")

REGISTERS = "demo-speeches:1,demo-fiction:1,demo-dialogue:1,demo-technical:1,demo-code:1"
CHATS_AND_TEXT = "demo-images:12,demo-registers:1"
_MIXED = (REGISTERS, CHATS_AND_TEXT)
#: What built-in names stand for: (for a text model, for a multimodal one).
STANDS_FOR = {
    "demo": _MIXED,
    "demo-text": ("demo-speeches", "demo-speeches"),
    "demo-registers": (REGISTERS, REGISTERS),
    "demo-mixed": _MIXED,
}

_PART = r"[^:,]+:[0-9]{1,9}(?:\.[0-9]{1,9})?"
_MIXTURE = re.compile(rf"{_PART}(?:,{_PART})*")


def shares(dataset: str, multimodal: bool) -> dict[str, Fraction]:
    """The sets that a data set's name stands for, each with its share; the shares sum to 1.

    A name that is neither in STANDS_FOR nor has shares is one set.
    """
    if dataset in STANDS_FOR:
        dataset = STANDS_FOR[dataset][multimodal]
    if not _MIXTURE.fullmatch(dataset):
        return {dataset: Fraction(1)}
    weights: dict[str, Fraction] = {}
    for part in dataset.split(","):
        name, _, weight = part.rpartition(":")
        for inner, share in shares(name, multimodal).items():
            weights[inner] = weights.get(inner, Fraction(0)) + Fraction(weight) * share
    total = sum(weights.values())
    if not total:
        raise UserError(f"the shares of {dataset} are all 0: give at least one set more")
    return {name: weight / total for name, weight in weights.items() if weight}


def counts(parts: dict[str, Fraction], samples: int) -> dict[str, int]:
    """How many of `samples` each part gives: its share rounded down, and one more for the largest remainders."""
    found = {name: int(share * samples) for name, share in parts.items()}
    by_remainder = sorted(parts, key=lambda name: found[name] - parts[name] * samples)
    for name in by_remainder[: samples - sum(found.values())]:
        found[name] += 1
    return {name: count for name, count in found.items() if count}


def interleaved(*lists: Sequence[T]) -> list[T]:
    """The elements of several lists, those of each list in their order and evenly spread over the whole."""
    placed = [((i + 0.5) / len(elements), n, i) for n, elements in enumerate(lists) for i in range(len(elements))]
    return [lists[n][i] for _, n, i in sorted(placed)]
