"""Matrices for the QuIP# tests: those of all quantizers, with outliers in them."""

from collections.abc import Callable
from functools import partial

import pytest
from torch import Tensor


@pytest.fixture(scope="session")
def correlated(correlated: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """As for all quantizers, with one column and one row of `weight` that stand out: what incoherence is for."""
    return partial(correlated, outliers=True)
