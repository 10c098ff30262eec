"""Signs, the change of basis, and what it does to outliers."""

import pytest
import torch
from casp_quip_sharp.incoherence import (
    incoherence,
    incoherent_hessian,
    incoherent_weight,
    original_weight,
    packed_signs,
    random_signs,
    unpack_signs,
)


@pytest.mark.parametrize("size", [1, 7, 8, 37, 192])
def test_signs_take_a_bit_each(size):
    packed = random_signs(size, torch.Generator().manual_seed(0))
    assert (packed.shape, packed.dtype) == ((packed_signs(size),), torch.uint8)
    signs = unpack_signs(packed, size, torch.float64)
    assert set(signs.tolist()) <= {1.0, -1.0}
    bits = [int(packed[i // 8]) >> (i % 8) & 1 for i in range(8 * len(packed))]
    assert signs.tolist() == [1 - 2 * bit for bit in bits[:size]]
    assert not any(bits[size:])


def test_seeds_decide_the_signs():
    first, again, other = (random_signs(256, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 90 < (unpack_signs(first, 256, torch.float32) < 0).sum() < 166


@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (37, 40), (96, 56)])
def test_loss_stays_and_outliers_go(correlated, weighted_error, rows, columns):
    weight, hessian = (tensor.double() for tensor in correlated(rows, columns))
    generator = torch.Generator().manual_seed(0)
    out_signs, in_signs = (unpack_signs(random_signs(n, generator), n, torch.float64) for n in (rows, columns))
    moved = incoherent_weight(weight, out_signs, in_signs)
    assert torch.allclose(original_weight(moved, out_signs, in_signs), weight, atol=1e-12)
    other = torch.randn(rows, columns, dtype=torch.float64)
    before = weighted_error(weight, other, hessian)
    after = weighted_error(moved, incoherent_weight(other, out_signs, in_signs), incoherent_hessian(hessian, in_signs))
    assert after == pytest.approx(before, rel=1e-12)
    assert incoherence(weight) > 8
    assert incoherence(moved) < 5
    moved_hessian = incoherent_hessian(hessian, in_signs)
    spread = [(h.diagonal().max() / h.diagonal().min()).item() for h in (hessian, moved_hessian)]
    assert spread[1] < spread[0] / 20
