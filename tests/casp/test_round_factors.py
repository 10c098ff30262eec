"""The joint quantization of two factors, against brute force in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casp.lowrank import decompose, refit, round_factors


def positive(size, generator):
    a = torch.randn(size, size + 4, generator=generator, dtype=torch.float64)
    return a @ a.T / size


def cost(error, hessian, output_moment):
    return torch.einsum("ab,bi,ij,aj->", output_moment, error, hessian, error).item()


sizes = {"m": st.integers(2, 12), "n": st.integers(2, 12), "seed": st.integers(0, 999)}


@settings(max_examples=30, deadline=None)
@given(**sizes, share=st.floats(0.1, 1))
def test_refit_is_the_least_squares_solution_under_both_moments(m, n, seed, share):
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, int(share * min(m, n)))
    weight, down = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, n), (rank, n)))
    hessian, output_moment = positive(n, generator), positive(m, generator)
    # min over U of |A^T (W - U down) B|: one dense least-squares problem in the entries of U.
    left, right = torch.linalg.cholesky(output_moment), torch.linalg.cholesky(hessian)
    # (kron needs the memory of a transpose made anew.)
    system = torch.kron(
        left.T.clone(memory_format=torch.contiguous_format),
        (down @ right).T.clone(memory_format=torch.contiguous_format),
    )
    best = torch.linalg.lstsq(system, (left.T @ weight @ right).reshape(-1, 1)).solution.view(m, rank)
    found = refit(weight, down, hessian)
    assert cost(weight - found @ down, hessian, output_moment) == pytest.approx(
        cost(weight - best @ down, hessian, output_moment), rel=1e-5, abs=1e-8
    )


def grid(step):
    """Rounds to multiples of `step`."""

    def rounder(weight, moment, which):
        codes = (weight / step).round()
        return {"codes": codes}, codes * step

    return rounder


@settings(max_examples=30, deadline=None)
@given(**sizes)
def test_up_is_rounded_for_what_the_rounded_down_puts_out(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, hessian = torch.randn(m, n, generator=generator, dtype=torch.float64), positive(n, generator)
    found = decompose(weight, hessian, positive(m, generator))
    seen = []

    def rounder(part, moment, which):
        seen.append((which, part, moment))
        return grid(0.05)(part, moment, which)

    rounded = round_factors(weight, found.factors(max(1, min(m, n) // 2))[1], hessian, rounder)
    (first, down, of_inputs), (second, up, of_inner) = seen
    assert (first, second) == ("down", "up")
    torch.testing.assert_close(of_inputs, hessian.float())
    inputs = torch.linalg.cholesky(hessian)  # inputs whose second moment is H, exactly
    put_out = rounded.down.double() @ inputs
    torch.testing.assert_close(of_inner.double(), put_out @ put_out.T, rtol=1e-4, atol=1e-5)
    assert torch.equal(rounded.down, (down / 0.05).round() * 0.05)
    assert torch.equal(rounded.up, (up / 0.05).round() * 0.05)
    torch.testing.assert_close(rounded.dense(), rounded.up.double() @ rounded.down.double())


def test_refitting_beats_rounding_each_factor_by_itself():
    generator = torch.Generator().manual_seed(0)
    weight, hessian, output_moment = (
        torch.randn(48, 40, generator=generator).double(),
        *(positive(size, generator) for size in (40, 48)),
    )
    found = decompose(weight, hessian, output_moment)
    up, down = found.factors(16)
    step = 0.3
    apart = ((up / step).round() * step) @ ((down / step).round() * step)
    together = round_factors(weight, down, hessian, grid(step)).dense()
    assert cost(weight - together, hessian, output_moment) < 0.95 * cost(weight - apart, hessian, output_moment)


@settings(max_examples=20, deadline=None)
@given(**sizes)
def test_one_decomposition_serves_every_rank(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    hessian, output_moment = positive(n, generator), positive(m, generator)
    found = decompose(weight, hessian, output_moment)
    for rank in range(1, min(m, n) + 1):
        up, down = found.factors(rank)
        assert up.shape == (m, rank)
        assert down.shape == (rank, n)
        lost = cost(weight - up @ down, hessian, output_moment)
        assert found.lost(rank) == pytest.approx(lost, rel=1e-6, abs=1e-8 * found.singular[0].item() ** 2)
