"""Matrices, Hessians and the measure of error for the QuIP# tests."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def correlated() -> Callable[..., tuple[Tensor, Tensor]]:
    """Makes a weight (out, in) with outliers and the Hessian of correlated inputs whose scales differ a hundredfold."""

    def make(out_features: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(out_features, columns, generator=generator)
        weight[:, 3 % columns] *= 8
        weight[5 % out_features] *= 4
        mix = torch.randn(columns, columns, generator=generator) * torch.logspace(-1, 1, columns)
        x = torch.randn(4 * columns, columns, generator=generator) @ mix
        return weight, x.T @ x / len(x)

    return make


@pytest.fixture(scope="session")
def weighted_error() -> Callable[[Tensor, Tensor, Tensor], float]:
    """`tr(E H E^T)` of weight, approximation and Hessian, in float64."""

    def measure(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
        error = (weight - approximation).double()
        return ((error @ hessian.double()) * error).sum().item()

    return measure
