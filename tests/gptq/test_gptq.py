"""The algorithm: equal to the paper's, better than rounding, at ease with what real layers bring."""

import logging

import pytest
import torch
from casp_gptq.gptq import gptq_quantize
from casp_gptq.grid import find_grid, group_bounds, to_codes
from casp_gptq.reference import descend_reference, gptq_reference
from casp_gptq.refine import descend
from hypothesis import given, settings
from hypothesis import strategies as st

from casp.errors import UserError


def nearest(weight, bits, group_size, **grid):
    """Round to nearest on the grid of each group; grid: symmetric, clip_steps."""
    result = torch.empty_like(weight)
    for first, last in group_bounds(weight.shape[1], group_size):
        values = weight[:, first:last]
        scales, zeros = find_grid(values, bits, **grid)
        codes = to_codes(values, scales[:, None], zeros[:, None], bits)
        result[:, first:last] = scales[:, None] * (codes - zeros[:, None])
    return result


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "columns"), [(2, 32, 80), (3, -1, 150), (4, 128, 300), (8, 16, 40), (2, 96, 1100)]
)
def test_equals_the_paper_column_by_column(correlated, bits, group_size, columns, symmetric, act_order):
    weight, hessian = correlated(24, columns, seed=bits)
    settings = {"symmetric": symmetric, "act_order": act_order}
    fast = gptq_quantize(weight, hessian, bits, group_size, sweeps=0, **settings)
    slow = gptq_reference(weight, hessian, bits, group_size, **settings)
    assert torch.equal(fast.zeros, slow.zeros)
    assert torch.allclose(fast.scales.float(), slow.scales.float(), rtol=2e-3)
    # A value half-way between two codes may fall either way in float32, and what follows in its row with it.
    assert (fast.codes == slow.codes).all(1).float().mean() >= 0.9


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("columns", [40, 130, 1100])
def test_a_sweep_equals_one_column_after_the_other(correlated, columns, last):
    weight, hessian = correlated(24, columns)
    hessian += 0.05 * hessian.diagonal().mean() * torch.eye(columns)
    target, draw = weight.T.float(), torch.Generator().manual_seed(0)
    scales = 0.5 + torch.rand(columns, 24, generator=draw)
    codes = torch.randint(0, 8, (columns, 24), generator=draw).float()
    gradient = hessian.float() @ (target - scales * (codes - 4))
    found, left = descend(hessian.float(), codes, gradient, scales, 3, last)
    wanted, gradient_left = descend_reference(hessian, codes, gradient, scales, 3)
    assert (found != codes).any(1).all()
    alike = (found == wanted).all(0)  # half-way between two codes it may fall either way, and what follows with it
    assert alike.float().mean() >= 0.9
    if not last:
        torch.testing.assert_close(
            left[:, alike], gradient_left[:, alike], rtol=1e-3, atol=1e-4 * gradient.abs().max().item()
        )


def test_error_is_below_rounding_to_nearest(correlated, weighted_error):
    for bits in (2, 3, 4, 8):
        weight, hessian = correlated(16, 96, seed=bits)
        ours = gptq_quantize(weight, hessian, bits, 32).dequantize()
        rounded = nearest(weight, bits, 32, symmetric=False, clip_steps=20)
        assert weighted_error(weight, ours, hessian) < 0.5 * weighted_error(weight, rounded, hessian)


@pytest.mark.parametrize("sweeps", [1, 2, 4])
def test_refinement_only_improves(correlated, weighted_error, sweeps):
    weight, hessian = correlated(24, 80)
    hessian += 0.5 * hessian.diagonal().mean() * torch.eye(80)  # so that the damping added inside is nothing
    plain = gptq_quantize(weight, hessian, 2, 32, damping=1e-6, sweeps=0).dequantize()
    refined = gptq_quantize(weight, hessian, 2, 32, damping=1e-6, sweeps=sweeps).dequantize()
    assert weighted_error(weight, refined, hessian) < weighted_error(weight, plain, hessian)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), st.sampled_from([-1, 1, 7, 16, 64]), st.booleans())
def test_uncorrelated_inputs_of_one_size_leave_rounding_to_nearest(bits, columns, group_size, act_order):
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    quantized = gptq_quantize(weight, torch.eye(columns), bits, group_size, act_order=act_order, sweeps=0)
    expected = nearest(weight, bits, group_size, symmetric=False, clip_steps=20)
    # The factor of H scales all candidates' costs alike; only float32 ties between grids may fall otherwise.
    assert torch.allclose(quantized.dequantize(), expected) or (
        (quantized.dequantize() - weight).square().sum() <= (expected - weight).square().sum() * (1 + 1e-5)
    )


def test_permuting_columns_within_the_only_group_permutes_the_result(correlated):
    weight, hessian = correlated(12, 48)
    shuffle = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    straight = gptq_quantize(weight, hessian, 3, -1, sweeps=0)
    shuffled = gptq_quantize(weight[:, shuffle], hessian[shuffle][:, shuffle], 3, -1, sweeps=0)
    assert torch.equal(straight.codes[:, shuffle], shuffled.codes)
    assert torch.equal(straight.scales, shuffled.scales)


def test_act_order_does_not_matter_when_the_columns_stand_in_order(correlated):
    weight, hessian = correlated(12, 48)
    order = torch.argsort(hessian.diagonal(), descending=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    with_order = gptq_quantize(weight, hessian, 4, -1, act_order=True)
    without = gptq_quantize(weight, hessian, 4, -1, act_order=False)
    assert torch.equal(with_order.codes, without.codes)


def test_inputs_that_never_occur(correlated, weighted_error):
    weight, hessian = correlated(16, 64)
    dead = torch.tensor([0, 17, 18, 63])
    hessian[dead] = hessian[:, dead] = 0
    quantized = gptq_quantize(weight, hessian, 4, 32)
    result = quantized.dequantize()
    rounded = nearest(weight, 4, 32, symmetric=False, clip_steps=0)
    assert weighted_error(weight, result, hessian) < weighted_error(weight, rounded, hessian)
    # Nobody feeds on their errors, so they are rounded to nearest on the grid of their group.
    group = dead // 32
    scales, zeros = quantized.scales.float()[:, group], quantized.zeros.float()[:, group]
    codes = to_codes(weight[:, dead], scales, zeros, 4)
    assert torch.equal(codes.to(torch.uint8), quantized.codes[:, dead])


def test_a_hessian_of_zeros_and_a_weight_of_zeros():
    weight = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    result = gptq_quantize(weight, torch.zeros(20, 20), 8, 8).dequantize()
    assert (result - weight).abs().max() < 0.05
    nothing = gptq_quantize(torch.zeros(4, 20), torch.eye(20), 2, 8).dequantize()
    assert torch.equal(nothing, torch.zeros(4, 20))


def test_fewer_samples_than_columns_and_no_damping(caplog):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 64, generator=generator), torch.randn(10, 64, generator=generator)
    with caplog.at_level(logging.WARNING):
        quantized = gptq_quantize(weight, x.T @ x / 10, 4, 32, damping=1e-12, name="model.layers.3.mlp.up_proj")
    assert torch.isfinite(quantized.dequantize()).all()
    assert any("model.layers.3.mlp.up_proj" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_named(correlated, value):
    weight, hessian = correlated(4, 16)
    weight[2, 3] = value
    with pytest.raises(UserError, match=r"blocks\.7\.q_proj holds NaN"):
        gptq_quantize(weight, hessian, 4, 16, name="blocks.7.q_proj")
    weight[2, 3] = 0
    hessian[1, 1] = value
    with pytest.raises(UserError, match=r"blocks\.7\.q_proj"):
        gptq_quantize(weight, hessian, 4, 16, name="blocks.7.q_proj")


@pytest.mark.parametrize(("bits", "group_size"), [(1, 32), (5, 32), (16, 32), (0, 32), (4, 0), (4, -2)])
def test_impossible_formats_are_refused(correlated, bits, group_size):
    with pytest.raises(UserError, match=r"--bits|--group-size"):
        gptq_quantize(*correlated(4, 16), bits, group_size)


def test_a_hessian_of_another_layer_is_refused(correlated):
    weight, _ = correlated(4, 16)
    with pytest.raises(UserError, match="same layer"):
        gptq_quantize(weight, torch.eye(17), 4, 16)


def test_two_runs_give_the_same(correlated):
    one, two = (gptq_quantize(*correlated(16, 100), 2, 32) for _ in range(2))
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scales, two.scales)
    assert torch.equal(one.zeros, two.zeros)


def test_inputs_stay_as_they_are(correlated):
    weight, hessian = correlated(8, 40)
    kept = weight.clone(), hessian.clone()
    gptq_quantize(weight, hessian, 2, 16)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])
