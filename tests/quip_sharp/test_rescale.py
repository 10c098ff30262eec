"""Scales of the columns: their closed forms, the columns that have none, and that they pay."""

import pytest
import torch
from casp_quip_sharp.backend import QuipSharp
from casp_quip_sharp.lattice import Lattice
from casp_quip_sharp.linear import QuipSharpLinear
from casp_quip_sharp.quantize import Basis, Candidate, SharedInput, rank_scales, round_best
from casp_quip_sharp.rescale import column_scales


@pytest.fixture
def uneven(correlated):
    """A weight whose columns differ in norm by a factor of about 50, and a Hessian."""
    weight, hessian = correlated(64, 192)
    return weight * torch.linspace(2, -2, 192).exp(), hessian


def test_both_ends_are_the_minima_of_what_they_are_for(uneven):
    weight, hessian = (x.double() for x in uneven)

    def fine(s):
        return ((weight * s).square().sum() / s.square().prod() ** (1 / 192)).item()

    def coarse(s):
        return ((hessian.diagonal() / s.square()).sum() * (weight * s).square().sum()).item()

    generator = torch.Generator().manual_seed(0)
    for cost, powers in ((fine, (0.0, 1.0)), (coarse, (0.25, 0.5))):
        best = column_scales(*uneven, powers)
        assert best.log().mean().item() == pytest.approx(0, abs=1e-9)
        for _ in range(20):
            other = best * (0.1 * torch.randn(192, generator=generator, dtype=torch.float64)).exp()
            assert cost(best) < cost(other)


def test_unused_and_empty_columns_keep_finite_scales(uneven):
    weight, hessian = (x.clone() for x in uneven)
    weight[:, 3] = 0
    hessian[5], hessian[:, 5] = 0, 0
    for powers in ((0.0, 1.0), (0.25, 0.5), (0.1, 0.75)):
        assert torch.isfinite(column_scales(weight, hessian, powers)).all()
        nothing = column_scales(torch.zeros_like(weight), torch.zeros_like(hessian), powers)
        assert torch.allclose(nothing, torch.ones(192, dtype=torch.float64))
    assert torch.equal(column_scales(weight, hessian, (0.0, 0.0)), torch.ones(192, dtype=torch.float64))


@pytest.mark.parametrize("bits", [2, 4])
def test_real_vectors_bring_less_error_than_signs(uneven, weighted_error, bits):
    weight, hessian = uneven
    errors = {}
    for vectors in ("signs", "tuned"):
        format = {"bits": bits, "vectors": vectors}
        module = QuipSharpLinear(64, 192, False, format)
        generator = torch.Generator().manual_seed(0)
        module.load_state_dict(QuipSharp().quantize(weight, hessian, format, generator))
        errors[vectors] = weighted_error(weight, module.dequantize(), hessian)
    assert errors["tuned"] < 0.1 * errors["signs"]


def test_a_scale_that_fails_on_the_whole_matrix_gives_way_to_the_next(correlated):
    weight, hessian = correlated(64, 96)
    signs = torch.ones(64), torch.ones(96)
    basis = Basis.of(weight, *signs, SharedInput(hessian, 0.01, "weight").factors(signs[1], 8))
    good = rank_scales([basis], Lattice(2))[0]
    misleading = Candidate(good.loss / 2, basis, good.scale / 8)  # promises much, and clips nearly every weight
    codebook = Lattice(2)
    chosen, codes = round_best([misleading, good], codebook, sweeps=1)
    assert chosen is good
    error = basis.weight - good.scale * codebook.points(codebook.stored(codes), 64, 96)
    assert ((error @ basis.factors.hessian) * error).sum() / 64 < 1.5 * good.loss
    assert round_best([good, misleading], codebook, sweeps=1)[0] is good
