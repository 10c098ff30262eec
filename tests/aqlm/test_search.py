"""The search of codes, codebooks and scales against plain float64 and against closed forms."""

from itertools import pairwise

import pytest
import torch
from casp_aqlm.codebooks import best_scales, refit
from casp_aqlm.codes import descend, round_with_feedback
from casp_aqlm.factors import Factors, order_of_activation, weighted_loss
from casp_aqlm.linear import decode
from casp_aqlm.nearest import JOINT, Search
from casp_aqlm.published import published_aqlm, residual_k_means, search_codes
from casp_aqlm.quantize import quantize_additive
from casp_aqlm.scheme import Scheme

from casp.rounding import weighted_error

SCHEME = Scheme(2, 4, 8)


def start(weight, scheme=SCHEME):
    """Codes and codebooks as the published code starts, float32, for scales of 1."""
    codebooks, codes = residual_k_means(weight.view(-1, scheme.group), scheme, torch.Generator().manual_seed(0), 5)
    return codes.view(len(weight), -1, scheme.codebooks), codebooks


def losses(weight, codes, codebooks, hessian):
    return weighted_loss(weight.double() - decode(codes, codebooks).double(), hessian.double())


@pytest.mark.parametrize("scheme", [SCHEME, Scheme(1, 5, 4), Scheme(3, 3, 8)], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_one_code_at_a_time_the_kept_gradient_leads_to_the_codes_of_recomputing_it(matrix, scheme, compiled):
    weight, hessian = matrix(48, 192)
    factors = Factors.of(hessian, scheme.group, 0.01)
    codes, codebooks = start(weight, scheme)
    order = list(reversed(range(codes.shape[1])))
    damped = factors.hessian.double()
    plain = search_codes(weight.double(), codes, codebooks.double(), torch.ones(48).double(), damped, order)
    kept = descend(weight, codes, codebooks, factors, Search(compiled=compiled, jointly=False))
    assert (plain == kept).float().mean() > 0.999  # float32 may see a tie the other way
    assert torch.allclose(losses(weight, plain, codebooks, damped), losses(weight, kept, codebooks, damped), rtol=1e-3)
    assert (plain != codes).float().mean() > 0.05


def test_factors_are_those_of_the_damped_moment(matrix):
    _, hessian = matrix(1, 48)
    factors = Factors.of(hessian, 8, 0.02)
    damped = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(48)
    rebuilt = factors.feedback @ torch.block_diag(*(m @ m.T for m in factors.rounding)) @ factors.feedback.T
    assert torch.allclose(factors.hessian.double(), damped, atol=1e-6)
    assert torch.allclose(rebuilt.double(), damped, atol=1e-5)


def test_the_heaviest_inputs_are_rounded_first_and_codes_stay_in_the_order_of_the_columns(matrix):
    weight, hessian = matrix(64, 64)
    size = torch.linspace(3, 0.1, 8)[torch.randperm(8, generator=torch.Generator().manual_seed(1))].repeat_interleave(8)
    hessian = hessian * size[:, None] * size
    order = order_of_activation(hessian, 8)
    traces = torch.stack([hessian[8 * k : 8 * k + 8, 8 * k : 8 * k + 8].diagonal().sum() for k in order])
    assert (traces.diff() >= 0).all()
    assert sorted(order.tolist()) == list(range(8))
    found = quantize_additive(weight, hessian, SCHEME, torch.Generator().manual_seed(0), damping=1e-6)
    assert found.history[-1][1] == pytest.approx(weighted_error(weight, found.dequantize(), hessian), rel=1e-3)


def test_feedback_beats_rounding_each_group_by_itself(matrix):
    weight, hessian = matrix(64, 128)
    factors = Factors.of(hessian, 8, 0.01)
    codes, codebooks = start(weight)
    fed = round_with_feedback(weight, codebooks, factors, JOINT)
    assert losses(weight, fed, codebooks, hessian).sum() < 0.7 * losses(weight, codes, codebooks, hessian).sum()


def test_a_sweep_raises_the_loss_of_no_row(matrix):
    weight, hessian = matrix(64, 320)
    factors = Factors.of(hessian, 8, 0.01)
    codes, codebooks = start(weight)
    before = losses(weight, codes, codebooks, factors.hessian)
    for search in (JOINT, Search(jointly=False)):
        after = losses(weight, descend(weight, codes, codebooks, factors, search), codebooks, factors.hessian)
        assert (after <= before * (1 + 1e-5)).all()
        assert after.sum() < 0.9 * before.sum()


def test_refit_goes_to_the_least_squares_codebooks(matrix):
    weight, hessian = matrix(96, 32)
    factors = Factors.of(hessian, 8, 0.01)
    scheme = Scheme(2, 3, 8)
    codes, codebooks = start(weight, scheme)
    row_weights = torch.rand(96, generator=torch.Generator().manual_seed(5)) + 0.5

    # The same problem as one dense least squares: unknowns are all numbers of all codebooks.
    root = torch.linalg.cholesky(factors.hessian.double())
    unknowns = codebooks.numel()
    design = torch.stack(
        [
            (decode(codes, unit.view_as(codebooks)) @ root * row_weights.double().sqrt()[:, None]).flatten()
            for unit in torch.eye(unknowns, dtype=torch.float64)
        ],
        1,
    )
    wanted = (weight.double() @ root * row_weights.double().sqrt()[:, None]).flatten()
    best = (wanted - design @ torch.linalg.lstsq(design, wanted[:, None], driver="gelsd").solution[:, 0]).square().sum()

    def loss(found):
        return (row_weights.double() * losses(weight, codes, found, factors.hessian)).sum()

    assert loss(refit(weight, codes, codebooks, row_weights, factors, 200)) < 1.001 * best
    few = loss(refit(weight, codes, codebooks, row_weights, factors, 10))
    assert few - best < 0.2 * (loss(codebooks) - best)


def test_scales_are_the_minimum_of_each_row(matrix):
    weight, hessian = matrix(6, 16)
    points = weight * 0.7 + 0.1
    scales = best_scales(weight, points, hessian.float(), torch.ones(6))
    for near in (0.99, 1.01):
        worse = weighted_loss(weight - near * scales[:, None] * points, hessian.float())
        assert (worse >= weighted_loss(weight - scales[:, None] * points, hessian.float())).all()
    assert torch.equal(best_scales(weight, -points, hessian.float(), torch.full((6,), 3.0)), torch.full((6,), 3.0))


def test_loss_falls_to_the_end_and_is_what_the_matrix_says(matrix):
    weight, hessian = matrix(96, 128)
    found = quantize_additive(weight, hessian, SCHEME, torch.Generator().manual_seed(0), damping=1e-6)
    seconds, curve = zip(*found.history, strict=True)
    assert list(seconds) == sorted(seconds)
    assert all(later <= earlier * (1 + 1e-3) for earlier, later in pairwise(curve))
    assert curve[-1] == pytest.approx(weighted_error(weight, found.dequantize(), hessian), rel=1e-3)


def test_below_the_published_algorithm_in_less_time(matrix):
    weight, hessian = matrix(64, 64, seed=3)
    scheme, factors = Scheme(2, 3, 8), Factors.of(hessian, 8, 0.01)
    quantize_additive(weight[:32], hessian, scheme, torch.Generator().manual_seed(0))  # compiles the loops
    ours = quantize_additive(weight, hessian, scheme, torch.Generator().manual_seed(0))
    theirs = published_aqlm(weight, factors.hessian, scheme, torch.Generator().manual_seed(0), max_epochs=8)
    assert ours.history[-1][1] < theirs.history[-1][1]
    assert ours.history[-1][0] < theirs.history[-1][0]


def test_published_loss_never_rises_between_epochs(matrix):
    weight, hessian = matrix(32, 64)
    found = published_aqlm(weight, hessian, Scheme(2, 3, 8), torch.Generator().manual_seed(0), max_epochs=4)
    starts = [loss for _, loss in found.history[::2]]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(starts))
    assert found.history[-1][1] == pytest.approx(weighted_error(weight, found.dequantize(), hessian), rel=1e-6)
