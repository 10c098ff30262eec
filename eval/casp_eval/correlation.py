"""Spearman's rank correlation, which is undefined, and then None, where all values of a list are alike."""

from collections.abc import Sequence

from scipy.stats import spearmanr


def spearman(one: Sequence[float], other: Sequence[float]) -> dict[str, float | None]:
    """{"spearman", "p"} of two lists of equal length; None for both where a list is constant or has fewer than 2."""
    if min(len(set(one)), len(set(other))) < 2:
        return {"spearman": None, "p": None}
    found = spearmanr(one, other)
    # Two values have a correlation, but no test of it.
    return {"spearman": float(found.statistic), "p": float(found.pvalue) if len(one) > 2 else None}
