"""The block LDL, what it predicts, the sweeps, and LDLQ against GPTQ."""

import pytest
import torch
from casp_gptq.gptq import gptq_quantize
from casp_quip_sharp.backend import QuipSharp
from casp_quip_sharp.incoherence import incoherent_hessian, incoherent_weight, random_signs, unpack_signs
from casp_quip_sharp.lattice import Lattice
from casp_quip_sharp.ldlq import block_ldl, descend, ldlq
from casp_quip_sharp.ldlq_compiled import descend_block_compiled, round_block_compiled
from casp_quip_sharp.linear import QuipSharpLinear
from casp_quip_sharp.quantize import round_rows
from casp_quip_sharp.search import descend_block_reference, quantize_vectors, round_block_reference
from casp_quip_sharp.trellis.codebook import Trellis
from casp_quip_sharp.trellis.columns import nearest_column

BOTH = pytest.mark.parametrize("family", [Lattice, Trellis])


@pytest.fixture
def problem(correlated, family):
    """A target of unit variance, 160 columns (two lazy blocks, one of them short), and its factors."""
    weight, hessian = correlated(24, 160)
    generator = torch.Generator().manual_seed(0)
    in_signs, out_signs = (unpack_signs(random_signs(n, generator), n) for n in (160, 24))
    moved = incoherent_weight(weight, out_signs, in_signs)
    factors = block_ldl(incoherent_hessian(hessian.double(), in_signs.double()), 0.01, family(2).group)
    return moved / moved.square().mean().sqrt(), factors


def row_costs(target, rounded, factors):
    error = (target - rounded.points).double()
    return ((error @ factors.hessian.double()) * error).sum(1)


def blocks_of(factors, group):
    """D of `H = A D A^T`, (n, n), computed from H and A in float64."""
    inverse = torch.linalg.inv(factors.feedback.double())
    return inverse @ factors.hessian.double() @ inverse.T


@BOTH
def test_block_ldl(problem, family):
    _, factors = problem
    a, group = factors.feedback.double(), family(2).group
    blocks = torch.arange(160) // group
    assert not a[blocks[:, None] < blocks[None, :]].any()
    same = blocks[:, None] == blocks[None, :]
    assert torch.allclose(a[same], torch.eye(160, dtype=torch.float64)[same], atol=1e-5)
    d = blocks_of(factors, group)
    assert d[~same].abs().max() < 1e-4 * d.diagonal().max()
    assert (torch.linalg.eigvalsh(torch.where(same, d, 0)) > 0).all()


@BOTH
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_error_is_what_the_identity_predicts(problem, family, bits):
    target, factors = problem
    codebook = family(bits)
    rounded = ldlq(target, factors, codebook)
    error = (target - rounded.points).double()
    left = error @ factors.feedback.double()  # what each group's own rounding left
    predicted = ((left @ blocks_of(factors, codebook.group)) * left).sum().item()
    assert row_costs(target, rounded, factors).sum().item() == pytest.approx(predicted, rel=1e-3)
    # Each group went to the nearest point of what the later groups' errors made of it.
    wanted = left.float() + rounded.points
    if family is Lattice:
        _, nearest = quantize_vectors(wanted.reshape(-1, 8), bits)
        distance = (wanted.reshape(-1, 8) - nearest).norm(dim=1)
        assert (distance > left.reshape(-1, 8).norm(dim=1) - 1e-3).all()
    else:
        for j in range(0, 160, 7):
            _, nearest = nearest_column(wanted[:, j], codebook.values(wanted.device), bits)
            assert (wanted[:, j] - nearest).norm() > left[:, j].norm() - 1e-3


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_compiled_loops_do_what_the_plain_ones_do(correlated, bits, threads, monkeypatch):
    weight, hessian = correlated(80, 48)
    target = weight / weight.square().mean().sqrt()
    factors = block_ldl(hessian.double(), 0.01, 8)
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


@BOTH
def test_sweeps_never_raise_the_cost_of_what_is_rounded_together(problem, family):
    target, factors = problem
    codebook = family(2)
    rounded = ldlq(target, factors, codebook)
    first = row_costs(target, rounded, factors)
    gradient = (target - rounded.points) @ factors.hessian
    for _ in range(2):
        before = row_costs(target, rounded, factors)
        rounded, gradient = descend(gradient, factors, rounded, codebook)
        after = row_costs(target, rounded, factors)
        if family is Trellis:  # all 24 rows are one walk
            before, after = before.sum(), after.sum()
        assert (after <= before * (1 + 1e-5)).all()
        expected = (target - rounded.points) @ factors.hessian
        assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6 * expected.abs().max().item())
    assert row_costs(target, rounded, factors).sum() < 0.97 * first.sum()


@BOTH
@pytest.mark.parametrize("sweeps", [0, 1, 4])
def test_rounding_a_matrix_returns_what_each_row_costs(problem, family, sweeps):
    target, factors = problem
    rounded, losses = round_rows(target, factors, family(2), sweeps)
    assert torch.allclose(losses.double(), row_costs(target, rounded, factors), rtol=1e-4)


FORMATS = pytest.mark.parametrize("format", [{}, {"codebook": "trellis", "states": 8}], ids=["e8p", "trellis"])


def error_of(weight, hessian, format, weighted_error, used=None, **settings):
    """Weighted error of a quantized matrix; used: the Hessian that it was quantized under, if another."""
    module = QuipSharpLinear(*weight.shape, False, format)
    used, seed = hessian if used is None else used, torch.Generator().manual_seed(0)
    module.load_state_dict(QuipSharp().quantize(weight, used, format, seed, **settings))
    return weighted_error(weight, module.dequantize(), hessian)


@FORMATS
@pytest.mark.parametrize(("bits", "share"), [(2, 0.8), (3, 0.8), (4, 1.0)])
def test_below_gptq_at_equal_bits(correlated, weighted_error, format, bits, share):
    weight, hessian = correlated(64, 192)
    ours = error_of(weight, hessian, {**format, "bits": bits}, weighted_error)
    theirs = weighted_error(weight, gptq_quantize(weight, hessian, bits, 64).dequantize(), hessian)
    assert ours < share * theirs


@FORMATS
def test_feedback_scale_search_and_sweeps_each_pay(correlated, weighted_error, format):
    weight, hessian = correlated(64, 192)

    def error(**settings):
        return error_of(weight, hessian, {**format, "bits": 2}, weighted_error, **settings)

    nearest = error(used=torch.eye(192), search_scale=False, sweeps=0)
    plain = error(search_scale=False, sweeps=0)
    searched = error(sweeps=0)
    assert plain < 0.7 * nearest
    assert searched < 1.02 * plain
    assert error() < 0.97 * searched


@pytest.mark.parametrize(("bits", "share"), [(1, 0.95), (2, 0.9), (3, 0.8), (4, 0.8)])
def test_the_trellis_is_below_e8p_by_what_the_codebooks_differ(weighted_error, bits, share):
    """White inputs: no feedback, so only the distortion of the codebooks counts (0.87, 0.81, 0.67, 0.66)."""
    weight, hessian = torch.randn(256, 192, generator=torch.Generator().manual_seed(0)), torch.eye(192)
    ours, theirs = (
        error_of(weight, hessian, {**format, "bits": bits}, weighted_error) for format in ({"codebook": "trellis"}, {})
    )
    assert ours < share * theirs
