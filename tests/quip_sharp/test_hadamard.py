"""Hadamard orders, and the orthogonal transform of every width."""

import numpy as np
import pytest
import torch
from casp_quip_sharp import hadamard
from casp_quip_sharp.hadamard import Plan, transform, transform_plan
from casp_quip_sharp.orders import LARGEST_ORDER, construction, hadamard_matrix, prime_power

from casp.errors import UserError

#: Widths of real models, all of them served by Hadamard matrices alone.
MODEL_WIDTHS = (64, 192, 576, 1536, 2560, 3584, 4096, 4864, 5120, 8192, 8960, 11008, 13824, 14336, 18944)
LARGE_WIDTHS = (27648, 28672, 29568)
#: Ranks of low-rank factors and other widths, and the width of Hartley's part.
OTHER_WIDTHS = {1: 1, 2: 1, 3: 3, 8: 1, 36: 1, 37: 37, 72: 1, 90: 45, 108: 1, 118: 59, 59 * 16: 59, 2 * 997: 997}


def test_prime_powers():
    found = {q: prime_power(q) for q in (2, 7, 9, 27, 343, 1, 6, 12, 171)}
    assert found == {2: (2, 1), 7: (7, 1), 9: (3, 2), 27: (3, 3), 343: (7, 3), 1: None, 6: None, 12: None, 171: None}


def test_every_order_is_a_hadamard_matrix():
    orders = [order for order in range(1, LARGEST_ORDER + 1) if construction(order)]
    assert {construction(order) for order in orders} == {"sylvester", "paley-1", "paley-2", "williamson"}
    assert {28, 92, 172 * 2, 76, 148} <= set(orders)  # GF(27), Williamson, GF(343), Paley II
    for order in orders:
        matrix = hadamard_matrix(order).astype(np.float32)
        assert (np.abs(matrix) == 1).all()
        assert (matrix @ matrix.T == order * np.eye(order, dtype=np.float32)).all(), order


def test_an_order_that_does_not_exist():
    with pytest.raises(UserError, match="order 6 "):
        hadamard_matrix(6)


@pytest.mark.parametrize("width", [*MODEL_WIDTHS, *LARGE_WIDTHS, *OTHER_WIDTHS])
def test_plan(width):
    plan = transform_plan(width)
    assert plan.width == width
    assert plan.hartley == OTHER_WIDTHS.get(width, 1)
    assert plan.is_hadamard == (plan.hartley == 1)
    assert width < 4096 or sum(plan.orders) <= 400  # n log n, not n^2


@pytest.mark.parametrize("width", [*MODEL_WIDTHS, *LARGE_WIDTHS, *OTHER_WIDTHS])
def test_orthogonal_to_round_off(width):
    x = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    y = transform(x)
    assert torch.allclose(transform(y, inverse=True), x, rtol=0, atol=1e-13)
    assert torch.allclose(transform(transform(x, inverse=True)), x, rtol=0, atol=1e-13)
    assert torch.allclose(y @ y.T, x @ x.T, rtol=1e-13, atol=1e-10)


@pytest.mark.parametrize("width", [64, 192, 576, 36, 37, 90, 118])
def test_inverse_is_the_transpose_and_entries_are_small(width):
    matrix = transform(torch.eye(width, dtype=torch.float64))  # rows are images of unit vectors: T^T
    assert torch.allclose(transform(torch.eye(width, dtype=torch.float64), inverse=True), matrix.T, atol=1e-14)
    assert torch.allclose(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), atol=1e-13)
    plan = transform_plan(width)
    largest = (1 if plan.is_hadamard else 2**0.5) / width**0.5
    assert matrix.abs().max() <= largest + 1e-12
    if plan.is_hadamard:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, largest))


def test_hartley_dense_and_fft_agree(monkeypatch):
    x = torch.randn(2, 37 * 4, dtype=torch.float64)
    monkeypatch.setattr(hadamard, "transform_plan", lambda width: Plan((), 37, 4))
    dense = transform(x)
    monkeypatch.setattr(hadamard, "_LARGEST_DENSE_HARTLEY", 1)
    assert torch.allclose(transform(x), dense, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_dtypes_and_input_left_alone(dtype):
    x = torch.randn(2, 3, 96).to(dtype)
    before = x.clone()
    y = transform(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert torch.equal(x, before)
    assert torch.allclose(y.double(), transform(x.double()), atol=2e-2 if dtype.itemsize == 2 else 1e-5)
    assert transform(x[:, :0]).shape == (2, 0, 96)
    one = torch.ones(1, 1)
    assert transform(one).data_ptr() != one.data_ptr()


@pytest.mark.parametrize("width", [576, 74])
def test_gradient_is_the_inverse_transform(width):
    x = torch.randn(2, 3, width, dtype=torch.float64, requires_grad=True)
    other = torch.randn(2, 3, width, dtype=torch.float64)
    (transform(x) * other).sum().backward()
    assert torch.allclose(x.grad, transform(other, inverse=True), atol=1e-13)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [64, 576, 11008])
def test_cuda_agrees(width):
    x = torch.randn(4, width)
    assert torch.allclose(transform(x.cuda()).cpu(), transform(x), atol=1e-4)
