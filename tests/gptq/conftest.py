"""Matrices, Hessians and the measure of error for the GPTQ tests."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def correlated() -> Callable[..., tuple[Tensor, Tensor]]:
    """Makes a weight (out, in) and the Hessian of strongly correlated inputs whose scales differ a hundredfold."""

    def make(out_features: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(out_features, columns, generator=generator)
        mix = torch.randn(columns, columns, generator=generator) * torch.logspace(-1, 1, columns)
        x = torch.randn(4 * columns, columns, generator=generator) @ mix
        return weight, x.T @ x / len(x)

    return make


@pytest.fixture(scope="session")
def weighted_error() -> Callable[[Tensor, Tensor, Tensor], float]:
    """`tr(D H D^T)` of weight, approximation and Hessian, in float64."""

    def measure(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
        d = (weight - approximation).double()
        return ((d @ hessian.double()) * d).sum().item()

    return measure
