"""Matrices with second moments of the kind that layers meet."""

import pytest
import torch


def correlated(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (rows, columns) and a second moment whose eigenvalues span four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.2)
    basis, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    spectrum = torch.logspace(0, -4, columns, dtype=torch.float64)
    return weight, (basis * spectrum) @ basis.T


@pytest.fixture
def matrix():
    """`correlated`, for tests that choose sizes and seed."""
    return correlated
