"""Calibration data mixed from several sets by shares, "NAME:SHARE,NAME:SHARE": what the built-in default is made of.

What a model is calibrated on decides what it keeps: at 2 bits, calibrated on speeches alone, `demo-llama` lost 0.85
nats on later speeches, 1.2 on a novel and 2.2 on technical prose; calibrated on chats about pictures alone,
`demo-llava` lost plain text. eval/scripts/calibration_mix.sh compares sets. The shares here are even over registers,
and four chats to a text, without a search.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

from casp.errors import UserError

T = TypeVar("T")

TEXT = "demo-speeches:1,demo-fiction:1,demo-dialogue:1,demo-technical:1,demo-code:1"
CHATS_AND_TEXT = "demo-images:4,demo-text:1"

_PART = r"[^:,]+:\d+(?:\.\d+)?"
_MIXTURE = re.compile(rf"{_PART}(?:,{_PART})*")


def shares(dataset: str, multimodal: bool) -> dict[str, Fraction]:
    """The sets that a data set's name stands for, each with its share; the shares sum to 1.

    "demo" is chats and text for a multimodal model and "demo-text" for a text model. A name without shares is one set.
    """
    if dataset == "demo":
        dataset = CHATS_AND_TEXT if multimodal else "demo-text"
    if dataset == "demo-text":
        dataset = TEXT
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
