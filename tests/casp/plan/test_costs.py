"""Predicted costs against what they stand for: sums over tokens of gradients and errors, and a real quantizer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casp.backend import load_backend
from casp.lowrank import decompose, leading, rank_for, round_factors
from casp.plan import costs
from casp.plan.costs import Pricing, key, price
from casp.plan.factors import Extent, FactorCosts, Factored, row_cost, under
from casp.plan.options import KEEP_RATIOS, layouts, option_bytes, ranks
from casp.seed import matrix_generator


class Known:
    """The moments of one linear, given."""

    def __init__(self, hessians, gradient_moment):
        self.hessians, self.gradient_moment = hessians, gradient_moment
        self.energy, self.tokens, self.losses = gradient_moment.trace().item(), 100, 100

    def hessian(self, weighting, sized_as=None):
        found = self.hessians[weighting]
        return found if sized_as is None else found * (self.hessians[sized_as].trace() / found.trace())


def two_sided_cost(error, hessian, gradient_moment):
    """`1/2 tr(G D H D^T)` of all of D (out, in), H (in, in), G (out, out)."""
    return 0.5 * ((gradient_moment @ error) * (error @ hessian)).sum().item()


@settings(max_examples=30, deadline=None)
@given(out=st.integers(1, 10), columns=st.integers(1, 10), seed=st.integers(0, 999))
def test_two_sided_cost_is_the_mean_over_tokens_where_gradients_and_inputs_are_independent(out, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    error, x, g = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((out, columns), (7, columns), (5, out))
    )
    every_pair = 0.5 * (g @ error @ x.T).square().mean().item()
    assert two_sided_cost(error, x.T @ x / 7, g.T @ g / 5) == pytest.approx(every_pair, rel=1e-9)


def test_rows_of_one_kind_predict_the_whole():
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(4000, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    g = torch.randn(4000, generator=generator, dtype=torch.float64)
    hessian = x.T @ x / 50
    exact = two_sided_cost(error, hessian, torch.diag(g.square()))
    assert row_cost(error[::10], under(hessian), g.square().sum().item()) == pytest.approx(exact, rel=0.2)


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, 96, generator=generator) * torch.logspace(0, -1.5, 96)

    def moment(size):
        mix = torch.randn(size, size, generator=generator) * torch.logspace(0, -1, size)
        x = torch.randn(4 * size, size, generator=generator) @ mix
        return x.T @ x / len(x)

    hessian = moment(96)
    return weight, Known({"gradient": hessian, "attention+gradient": hessian}, moment(64))


def test_prices_follow_what_quantizing_really_costs(problem):
    weight, moments = problem
    backend = load_backend("quip-sharp")
    pricing = Pricing(backend, low_rank=frozenset({"q"}))
    options = price(pricing, weight, moments, "q", "here")
    shapes = {(option.rank, tuple(map(key, option.formats))) for option in options}
    offered = layouts(backend, *weight.shape, low_rank=True)
    assert shapes == {(option.rank, tuple(map(key, option.formats))) for option in offered}
    hessian = moments.hessian("gradient")
    found = decompose(weight, hessian, moments.gradient_moment, pricing.damping)
    for option in options:
        assert option.bytes == option_bytes(backend, option.rank, option.formats, *weight.shape)
    wanted = [option for option in options if option.rank in (rank_for(0.25, 64, 96), rank_for(0.5625, 64, 96))]
    for option in wanted[::5]:
        formats = dict(zip(("down", "up"), option.formats, strict=True))

        def rounder(part, moment, which, formats=formats):
            dense = backend.linear(*part.shape, False, formats[which])
            dense.load_state_dict(backend.quantize(part, moment, formats[which], matrix_generator(1, which), name="x"))
            return {}, dense.dequantize()

        made = round_factors(weight.double(), found.factors(option.rank)[1], hessian, rounder).dense()
        measured = two_sided_cost(weight.double() - made, hessian.double(), moments.gradient_moment.double())
        assert option.cost == pytest.approx(measured, rel=0.35)
    assert price(pricing, weight, moments, "v", "here")[-1].rank is None


@pytest.mark.parametrize("shape", [(12, 30), (30, 30), (30, 12)])
def test_pricing_has_the_factors_of_the_whole_decomposition(shape):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(*shape, generator=generator)
    x, g = (torch.randn(200, size, generator=generator) for size in shape[::-1])
    hessian, gradients = x.T @ x / 200, g.T @ g / 200
    hessian[3], hessian[:, 3] = 0, 0  # an input that never occurs
    whole = decompose(weight, hessian, gradients, 0.001)
    down, spectrum = leading(weight, hessian, gradients, 7, 0.001)
    for rank in (0, 5, 12):
        assert spectrum.lost(rank) == pytest.approx(whole.lost(rank), rel=1e-6, abs=1e-9 * whole.lost(0))
    signs = (down * whole.down[:7]).sum(1, keepdim=True).sign()
    torch.testing.assert_close(down * signs, whole.down[:7], rtol=1e-5, atol=1e-6)


def test_what_refitting_up_cannot_make_good():
    """Against `H' = H - H down^T (down H down^T)^-1 down H` itself."""
    generator = torch.Generator().manual_seed(2)
    weight, x, down = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, 14), (40, 14), (6, 14))
    )
    hessian = x.T @ x / 40
    small, large = Factored.of(weight, hessian, torch.eye(9), Extent(64), "here").anchors(down, [4, 6])
    assert (small.rank, large.rank) == (4, 6)
    for anchor in (small, large):
        kept = down[: anchor.rank]
        inner = kept @ hessian @ kept.T
        missed = hessian - hessian @ kept.T @ torch.linalg.inv(inner) @ kept @ hessian
        torch.testing.assert_close(anchor.up, weight @ hessian @ kept.T @ torch.linalg.inv(inner), rtol=1e-6, atol=1e-9)
        sample = anchor.sample_of_down()
        error = sample.weight - sample.weight.round()
        energy = (anchor.up**2).sum().item() * (kept.square().mean() / sample.weight.double().square().mean()).item()
        wanted = 0.5 * energy * ((error.double() @ missed) * error.double()).sum().item() / len(error)
        assert sample.cost(sample.weight.round()) == pytest.approx(wanted, rel=1e-5)


def test_costs_told_by_distortions_are_what_measuring_finds(problem, monkeypatch):
    weight, moments = problem
    pricing = Pricing(load_backend("quip-sharp"), low_rank=frozenset({"q"}))
    told = price(pricing, weight, moments, "q", "here")
    assert len(pricing.measured(pricing.formats((64, 96)), (64, 96))) < len(pricing.formats((64, 96)))
    monkeypatch.setattr(costs, "FINE", 0.0)
    for one, other in zip(told, price(pricing, weight, moments, "q", "here"), strict=True):
        assert one.cost == pytest.approx(other.cost, rel=0.2)  # one bit makes a factor of 4


def test_costs_between_anchors_are_interpolated_in_logarithms():
    known = FactorCosts({"one": {10: 1.0, 40: 4.0}}, {"one": {10: 2.0, 40: 2.0}})
    assert known.at(20, "one", "one") == pytest.approx(4.0)
    assert known.at(10, "one", "one") == pytest.approx(3.0)
    assert known.at(20, "one", "two") is None


@given(out=st.integers(1, 400), columns=st.integers(1, 400))
def test_ranks_save_something_and_are_a_dozen_at_most(out, columns):
    found = ranks(out, columns)
    assert len(found) <= len(KEEP_RATIOS) <= 12
    assert found == sorted(set(found))
    assert all(rank * (out + columns) < out * columns for rank in found)
