"""Argparse types of numbers within a range: what is outside it is refused with the range in the message."""

import argparse
import math
from collections.abc import Callable

MOST_COUNT = 1 << 20
"""Samples, tokens of a sequence, questions: more of anything is a slip of the keyboard."""


def whole(least: int, most: int = MOST_COUNT) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text[:40]} is not at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text[:40]} is not at most {most}")
        return value

    number.__name__ = "whole number"  # argparse names the type so when int() fails
    return number


def real(least: float, most: float, least_too: bool = False) -> Callable[[str], float]:
    """A number above `least` (`least_too`: or equal to it) and at most `most`; never NaN or infinite."""

    def number(text: str) -> float:
        value = float(text)
        inside = least <= value <= most and (least_too or value > least)
        if not math.isfinite(value) or not inside:
            bound = "from" if least_too else "above"
            raise argparse.ArgumentTypeError(f"{text[:40]} is not a number {bound} {least:g} to {most:g}")
        return value

    number.__name__ = "number"
    return number


count = whole(1)
"""A whole number of at least 1."""
seed = whole(-(2**63), 2**63 - 1)
"""A seed: any number of 64 bits."""
