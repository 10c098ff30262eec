"""Symmetric matrices in place, against what PyTorch makes of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casp.moments.symmetric import PANEL, cholesky_, mirror_, symmetrise_

SIZES = st.one_of(st.integers(1, 40), st.sampled_from([PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 7]))


def square(size, seed):
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(size=SIZES, seed=st.integers(0, 99))
def test_cholesky_is_that_of_torch_and_leaves_the_upper_half(size, seed):
    matrix = square(size, seed)
    matrix = matrix @ matrix.T + torch.eye(size).double()
    found = matrix.clone()
    assert cholesky_(found)
    torch.testing.assert_close(found.tril(), torch.linalg.cholesky(matrix), rtol=1e-9, atol=1e-9)
    assert torch.equal(found.triu(1), matrix.triu(1))
    found.diagonal().copy_(matrix.diagonal())
    assert torch.equal(mirror_(found), matrix.triu() + matrix.triu(1).T)


@pytest.mark.parametrize("where", [0, PANEL + 3])
def test_what_is_not_positive_has_no_factor(where):
    matrix = torch.eye(PANEL + 5).double()
    matrix[where, where] = -1
    assert not cholesky_(matrix)


@settings(max_examples=20, deadline=None)
@given(size=SIZES, seed=st.integers(0, 99))
def test_symmetrised_is_the_mean_with_the_transpose(size, seed):
    matrix = square(size, seed)
    expected = (matrix + matrix.T) / 2
    assert torch.equal(symmetrise_(matrix), expected)
