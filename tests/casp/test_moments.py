"""Second moments against plain products in float64, their packed form, and the damped Cholesky factor."""

import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casp.errors import UserError
from casp.moments import SecondMoment, damped_cholesky, second_moment
from casp.moments.second_moment import diagonal, unpacked


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_mean_over_batches_of_any_shape(generator):
    x = torch.randn(6, 7, 5, generator=generator)
    moment = SecondMoment(5)
    moment.add(x[:2])
    moment.add(x[2:].reshape(-1, 5))
    flat = x.reshape(-1, 5).double()
    assert moment.count == 42
    assert moment.value().dtype == torch.float64
    torch.testing.assert_close(moment.value(), flat.T @ flat / 42, rtol=1e-6, atol=1e-7)


def test_weighted_mean_and_padding(generator):
    x = torch.randn(3, 4, 5, generator=generator)
    weights = torch.rand(3, 4, generator=generator)
    weights[1, 2:] = 0
    x[1, 2:] = float("nan")
    moment = SecondMoment(5)
    moment.add(x, weights)
    kept = weights > 0
    rows, w = x[kept].double(), weights[kept].double()
    expected = torch.einsum("t,ti,tj->ij", w, rows, rows) / w.sum()
    torch.testing.assert_close(moment.value(), expected, rtol=1e-6, atol=1e-7)


def test_half_precision_inputs_are_multiplied_in_float32(generator):
    x = torch.randn(1000, 3, generator=generator).to(torch.bfloat16)
    moment = SecondMoment(3)
    moment.add(x)
    expected = x.double().T @ x.double() / 1000
    torch.testing.assert_close(moment.value(), expected, rtol=1e-5, atol=1e-6)


@given(size=st.integers(1, 1200), tokens=st.integers(1, 40), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_panels_make_the_whole_matrix(size, tokens, seed):
    """Widths on all sides of a panel's 512 rows; the triangle is the upper half row after row."""
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed))
    moment = SecondMoment(size)
    moment.add(x)
    value, expected = moment.value(), x.double().T @ x.double() / tokens
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(value, value.T)
    rows, columns = torch.triu_indices(size, size)
    assert torch.equal(moment.triangle(), value[rows, columns].float())
    assert torch.equal(unpacked(moment.triangle()), value.float())
    assert torch.equal(diagonal(moment.triangle()), value.float().diagonal())


def test_no_triangle():
    with pytest.raises(ValueError, match="5 numbers"):
        unpacked(torch.zeros(5))


def test_wide_sums_are_kept_in_single_precision(monkeypatch, generator):
    monkeypatch.setattr(second_moment, "WIDEST_DOUBLE", 8)
    x = torch.randn(300, 9, generator=generator)
    moment = SecondMoment(9)
    for part in x.split(50):
        moment.add(part)
    assert moment.value().dtype == torch.float32
    torch.testing.assert_close(moment.value().double(), x.double().T @ x.double() / 300, rtol=1e-4, atol=1e-6)


def test_nothing_added_is_zero():
    assert torch.equal(SecondMoment(2).value(), torch.zeros(2, 2, dtype=torch.float64))


def test_cholesky_closed_form(generator):
    a = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    matrix = a @ a.T
    lower, used = damped_cholesky(matrix, 0.01, "layer")
    assert used == 0.01
    assert torch.equal(lower, lower.tril())
    expected = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(lower @ lower.T, expected)


def test_cholesky_symmetrises_and_leaves_its_input_alone():
    matrix = torch.tensor([[4.0, 1.0], [0.0, 1.0]])
    before = matrix.clone()
    lower, _ = damped_cholesky(matrix, 0.0, "layer")
    torch.testing.assert_close(lower @ lower.T, torch.tensor([[4.0, 0.5], [0.5, 1.0]], dtype=torch.float64))
    assert torch.equal(matrix, before)


@pytest.mark.parametrize(("damping", "used"), [(0.0, 0.1), (1e-3, 0.1)])
def test_cholesky_grows_the_damping_and_says_so(caplog, damping, used):
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0])).double()
    matrix[0, 1] = matrix[1, 0] = 1.45  # smallest eigenvalue -0.034: between 0.01 and 0.1 x mean
    with caplog.at_level(logging.WARNING):
        lower, got = damped_cholesky(matrix, damping, "model.layers.3.self_attn.q_proj")
    assert got == pytest.approx(used)
    torch.testing.assert_close(lower @ lower.T, matrix + got * 2.0 * torch.eye(3).double())
    assert "model.layers.3.self_attn.q_proj" in caplog.text
    assert f"{used:g}" in caplog.text


def test_cholesky_dead_inputs_take_the_mean_of_the_live():
    lower, used = damped_cholesky(torch.diag(torch.tensor([2.0, 0.0, 4.0])), 0.0, "layer")
    assert used == 0.0
    torch.testing.assert_close(lower @ lower.T, torch.diag(torch.tensor([2.0, 3.0, 4.0])).double())
    lower, _ = damped_cholesky(torch.zeros(2, 2), 0.0, "layer")
    torch.testing.assert_close(lower, torch.eye(2).double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_cholesky_of_nan_names_the_layer(bad):
    matrix = torch.eye(3)
    matrix[1, 1] = bad
    with pytest.raises(UserError, match=r"layers\.7.*calibration"):
        damped_cholesky(matrix, 0.01, "layers.7")


def test_what_is_no_second_moment(caplog):
    with pytest.raises(UserError, match="negative"):
        damped_cholesky(torch.diag(torch.tensor([1.0, -1.0])), 0.01, "layer")
    hopeless = torch.tensor([[1e-9, 1e9], [1e9, 1e-9]])
    lower, damping = damped_cholesky(hopeless, 0.0, "layer")
    assert damping == float("inf")
    assert torch.equal(lower, lower.diagonal().diag())  # each column for itself: rounding without feedback
    assert "layer: no Cholesky factor" in caplog.text


@pytest.mark.slow
def test_the_widest_matrix_of_70b_fits():
    """28,672 wide: sum, triangle and the matrix read back take at most 8 GB together."""
    program = """
import resource, torch
from casp.moments.second_moment import SecondMoment, unpacked
moment = SecondMoment(28672)
x = torch.randn(64, 28672)
moment.add(x)
triangle = moment.triangle()
del moment
matrix = unpacked(triangle)
assert torch.allclose(matrix[-300:, :5], x[:, -300:].T @ x[:, :5] / 64, atol=1e-4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 8
