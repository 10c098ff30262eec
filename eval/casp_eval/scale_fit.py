"""Seconds and bytes as sums of counted amounts: fitted to what was measured, told for what was not.

Every coefficient is the price of one unit of an amount on one core of the machine that measured, and not below `LEAST`:
non-negative least squares (Lawson & Hanson 1974, "Solving Least Squares Problems", chapter 23) on the measured values
in units of themselves, so that a short run counts as much as a long one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from casp_eval.scale_terms import LEAST, TERMS, Job, held


@dataclass(frozen=True)
class Fit:
    """What a unit of each amount takes, and by how much the fit misses the points, as shares: the mean and the most.

    unseen: the mean miss of each point by a fit to all others.
    """

    prices: Mapping[str, float]
    mean: float
    most: float
    unseen: float


def _rows(jobs: Sequence[Job], terms: Mapping) -> np.ndarray:
    return np.array([[amount(job) for amount in terms.values()] for job in jobs], dtype=float)


def _solved(rows: np.ndarray, values: np.ndarray, least: np.ndarray) -> np.ndarray:
    relative = rows / values[:, None]
    scale = np.maximum(np.abs(relative).max(0), np.finfo(float).tiny)  # flops are 1e15 where starts are 1
    return least + nnls(relative / scale, 1 - relative @ least)[0] / scale


def _fitted(rows: np.ndarray, values: np.ndarray, names: Sequence[str], floors: Mapping[str, float]) -> Fit:
    least = np.array([floors.get(name, 0.0) for name in names])
    prices = _solved(rows, values, least)
    missed = np.abs(rows @ prices / values - 1)
    others = [np.arange(len(values)) != place for place in range(len(values))]
    unseen = [abs(rows[i] @ _solved(rows[kept], values[kept], least) / values[i] - 1) for i, kept in enumerate(others)]
    named = dict(zip(names, prices.tolist(), strict=True))
    return Fit(named, float(missed.mean()), float(missed.max()), float(np.mean(unseen)))


def fit_seconds(jobs: Sequence[Job], seconds: Sequence[float]) -> Fit:
    """Of jobs of one stage, at least two, and the processor seconds of all ranks together."""
    terms = TERMS[jobs[0].stage]
    return _fitted(_rows(jobs, terms), np.array(seconds, dtype=float), list(terms), LEAST)


def fit_bytes(jobs: Sequence[Job], peaks: Sequence[float]) -> Fit:
    """Of jobs of one stage, and the peak of the rank that held most: a constant, and a factor on README's formula."""
    rows = np.array([[1.0, held(job)] for job in jobs])
    return _fitted(rows, np.array(peaks, dtype=float), ["libraries", "formula"], {})


def seconds_by_term(fit: Fit, job: Job) -> dict[str, float]:
    """Processor seconds of `job` for each of its stage's terms, on the machine that measured."""
    return {name: fit.prices[name] * amount(job) for name, amount in TERMS[job.stage].items()}


def peak_bytes(fit: Fit, job: Job) -> float:
    """Peak bytes of a rank of `job`."""
    return fit.prices["libraries"] + fit.prices["formula"] * held(job)
