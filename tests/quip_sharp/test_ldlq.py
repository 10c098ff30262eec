"""The block LDL, what it predicts, the sweeps, and LDLQ against GPTQ."""

import pytest
import torch
from casp_gptq.gptq import gptq_quantize
from casp_quip_sharp.incoherence import incoherent_hessian, incoherent_weight, random_signs, unpack_signs
from casp_quip_sharp.ldlq import (
    block_ldl,
    descend,
    descend_block_reference,
    ldlq,
    round_block_reference,
)
from casp_quip_sharp.ldlq_compiled import descend_block_compiled, round_block_compiled
from casp_quip_sharp.linear import QuipSharpLinear
from casp_quip_sharp.quantize import quantize_matrix, round_matrix
from casp_quip_sharp.search import quantize_vectors


@pytest.fixture
def problem(correlated):
    """A target in units of the 2-bit codebook, 160 columns (two lazy blocks, one of them short), and its factors."""
    weight, hessian = correlated(24, 160)
    generator = torch.Generator().manual_seed(0)
    in_signs, out_signs = (unpack_signs(random_signs(n, generator), n) for n in (160, 24))
    moved = incoherent_weight(weight, out_signs, in_signs)
    factors = block_ldl(incoherent_hessian(hessian.double(), in_signs.double()), 0.01)
    return moved / moved.square().mean().sqrt(), factors


def row_costs(target, rounded, factors):
    error = (target - rounded.points).double()
    return ((error @ factors.hessian.double()) * error).sum(1)


def test_block_ldl(problem):
    _, factors = problem
    a, d = factors.feedback.double(), torch.block_diag(*factors.diagonal.double())
    assert torch.allclose(a @ d @ a.T, factors.hessian.double(), rtol=1e-4, atol=1e-4 * factors.hessian.max().item())
    blocks = torch.arange(160) // 8
    assert not a[blocks[:, None] < blocks[None, :]].any()
    same = blocks[:, None] == blocks[None, :]
    assert torch.allclose(a[same], torch.eye(160, dtype=torch.float64)[same], atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_error_is_what_the_identity_predicts(problem, bits):
    target, factors = problem
    rounded = ldlq(target, factors, bits)
    error = target - rounded.points
    left = (error.double() @ factors.feedback.double()).view(24, -1, 8)  # what each group's own rounding left
    predicted = torch.einsum("rki,kij,rkj->", left, factors.diagonal.double(), left).item()
    assert row_costs(target, rounded, factors).sum().item() == pytest.approx(predicted, rel=1e-4)
    # Each group went to the nearest point of what the later groups' errors made of it.
    wanted = left.float() + rounded.points.view(24, -1, 8)
    _, nearest = quantize_vectors(wanted.reshape(-1, 8), bits)
    assert ((wanted.reshape(-1, 8) - nearest).norm(dim=1) > left.reshape(-1, 8).norm(dim=1) - 1e-3).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_compiled_loops_do_what_the_plain_ones_do(correlated, bits, threads, monkeypatch):
    weight, hessian = correlated(80, 48)
    target = weight / weight.square().mean().sqrt()
    factors = block_ldl(hessian.double(), 0.01)
    wanted = target + 0.1 * torch.randn(80, 48)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    plain, compiled = (
        rounding(wanted, target, factors.feedback, bits) for rounding in (round_block_reference, round_block_compiled)
    )
    gradient = (target - plain[1]) @ factors.hessian
    inverse = torch.linalg.inv(torch.stack([factors.hessian[i : i + 8, i : i + 8] for i in range(0, 48, 8)]))
    arguments = (gradient, factors.hessian, inverse, *plain, bits)
    moved, moved_compiled = (sweep(*arguments) for sweep in (descend_block_reference, descend_block_compiled))
    assert moved[1].any(1).float().mean() > 0.5
    for (codes, values), (others, other_values) in ((plain, compiled), (moved, moved_compiled)):
        # Where two points are as near as each other, either may be taken and the row goes on from there.
        same = torch.stack([(a == b).all(1) for a, b in zip(codes, others, strict=True)]).all(0)
        assert same.float().mean() > 0.95
        assert torch.allclose(values[same], other_values[same], atol=1e-5)
        assert [code.dtype for code in codes] == [code.dtype for code in others]


def test_sweeps_never_raise_the_cost_of_a_row(problem):
    target, factors = problem
    rounded = ldlq(target, factors, 2)
    first = row_costs(target, rounded, factors)
    gradient = (target - rounded.points) @ factors.hessian
    for _ in range(2):
        before = row_costs(target, rounded, factors)
        rounded, gradient = descend(gradient, factors, rounded, 2)
        assert (row_costs(target, rounded, factors) <= before * (1 + 1e-5)).all()
        assert torch.allclose(gradient, (target - rounded.points) @ factors.hessian, rtol=1e-3, atol=1e-5)
    assert row_costs(target, rounded, factors).sum() < 0.97 * first.sum()


@pytest.mark.parametrize("sweeps", [0, 1, 4])
def test_rounding_a_matrix_returns_what_each_row_costs(problem, sweeps):
    target, factors = problem
    rounded, losses = round_matrix(target, factors, 2, sweeps)
    assert torch.allclose(losses.double(), row_costs(target, rounded, factors), rtol=1e-4)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.8), (3, 0.8), (4, 1.0)])
def test_below_gptq_at_equal_bits(correlated, weighted_error, bits, share):
    weight, hessian = correlated(64, 192)
    module = QuipSharpLinear(64, 192, False, {"bits": bits})
    module.load_state_dict(quantize_matrix(weight, hessian, bits, torch.Generator().manual_seed(0)))
    ours = weighted_error(weight, module.dequantize(), hessian)
    theirs = weighted_error(weight, gptq_quantize(weight, hessian, bits, 64).dequantize(), hessian)
    assert ours < share * theirs


def test_feedback_scale_search_and_sweeps_each_pay(correlated, weighted_error):
    weight, hessian = correlated(64, 192)

    def error(hessian_used, **settings):
        module = QuipSharpLinear(64, 192, False, {"bits": 2})
        module.load_state_dict(quantize_matrix(weight, hessian_used, 2, torch.Generator().manual_seed(0), **settings))
        return weighted_error(weight, module.dequantize(), hessian)

    nearest = error(torch.eye(192), search_scale=False, sweeps=0)
    plain = error(hessian, search_scale=False, sweeps=0)
    searched = error(hessian, sweeps=0)
    assert plain < 0.7 * nearest
    assert searched < 1.02 * plain
    assert error(hessian) < 0.97 * searched
