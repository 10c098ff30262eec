import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casp.errors import UserError
from casp.lowrank import factor, rank_for


def positive(size: int, generator: torch.Generator) -> torch.Tensor:
    """A well-conditioned random second moment."""
    a = torch.randn(size, size + 4, generator=generator, dtype=torch.float64)
    return a @ a.T / size


def cost(error: torch.Tensor, hessian: torch.Tensor | None, output_moment: torch.Tensor | None) -> float:
    """`tr(M D H D^T)` summed entry by entry, independently of any factorisation of H or M."""
    hessian = torch.eye(error.shape[1], dtype=torch.float64) if hessian is None else hessian
    output_moment = torch.eye(error.shape[0], dtype=torch.float64) if output_moment is None else output_moment
    return torch.einsum("ab,bi,ij,aj->", output_moment, error, hessian, error).item()


moments = pytest.mark.parametrize(
    ("with_hessian", "with_output"), [(False, False), (True, False), (False, True), (True, True)]
)


def problem(m, n, seed, with_hessian, with_output):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    hessian = positive(n, generator) if with_hessian else None
    return weight, hessian, positive(m, generator) if with_output else None, generator


@moments
@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 24), n=st.integers(1, 24), share=st.floats(0.05, 1), seed=st.integers(0, 999))
def test_discarded_singular_values_are_the_cost(with_hessian, with_output, m, n, share, seed):
    weight, hessian, output_moment, _ = problem(m, n, seed, with_hessian, with_output)
    rank = max(1, int(share * min(m, n)))
    up, down, singular = factor(weight, rank, hessian, output_moment)
    assert (up.shape, down.shape, singular.shape) == ((m, rank), (rank, n), (min(m, n),))
    total = cost(weight, hessian, output_moment)
    expected = cost(weight - up @ down, hessian, output_moment)
    assert (singular**2).sum().item() == pytest.approx(total, rel=1e-8)
    assert (singular[rank:] ** 2).sum().item() == pytest.approx(expected, rel=1e-8, abs=1e-9 * total)


@moments
def test_cost_is_the_damped_one(with_hessian, with_output):
    weight, hessian, output_moment, _ = problem(12, 10, 1, with_hessian, with_output)
    damped = [
        None if moment is None else moment + 0.05 * moment.diagonal().mean() * torch.eye(len(moment)).double()
        for moment in (hessian, output_moment)
    ]
    up, down, singular = factor(weight, 4, hessian, output_moment, damping=0.05)
    assert (singular[4:] ** 2).sum().item() == pytest.approx(cost(weight - up @ down, *damped), rel=1e-9)


@moments
def test_no_perturbation_is_better(with_hessian, with_output):
    weight, hessian, output_moment, generator = problem(9, 7, 2, with_hessian, with_output)
    up, down, singular = factor(weight, 3, hessian, output_moment)
    best = (singular[3:] ** 2).sum().item()
    for scale in (1e-3, 1e-2, 1e-1):
        for _ in range(50):
            near_up = up + scale * torch.randn(up.shape, generator=generator, dtype=torch.float64)
            near_down = down + scale * torch.randn(down.shape, generator=generator, dtype=torch.float64)
            assert cost(weight - near_up @ near_down, hessian, output_moment) >= best


@moments
def test_alternating_least_squares_finds_the_same_minimum(with_hessian, with_output):
    """An independent solver: each factor in turn solved exactly from its normal equations."""
    weight, hessian, output_moment, generator = problem(9, 7, 3, with_hessian, with_output)
    h = torch.eye(7, dtype=torch.float64) if hessian is None else hessian
    down = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    m = torch.eye(9, dtype=torch.float64) if output_moment is None else output_moment
    for _ in range(2000):
        up = weight @ h @ down.T @ torch.linalg.inv(down @ h @ down.T)
        down = torch.linalg.inv(up.T @ m @ up) @ up.T @ m @ weight
    *_, singular = factor(weight, 3, hessian, output_moment)
    found = cost(weight - up @ down, hessian, output_moment)
    assert (singular[3:] ** 2).sum().item() == pytest.approx(found, rel=1e-6)


@moments
def test_full_rank_reproduces_the_weight(with_hessian, with_output):
    weight, hessian, output_moment, _ = problem(6, 8, 4, with_hessian, with_output)
    up, down, _ = factor(weight, 6, hessian, output_moment)
    torch.testing.assert_close(up @ down, weight)


def test_factors_are_balanced():
    weight, *_ = problem(8, 8, 5, False, False)
    up, down, _ = factor(weight, 4)
    torch.testing.assert_close(up.T @ up, down @ down.T)


def test_singular_moments_are_damped():
    generator = torch.Generator().manual_seed(6)
    thin = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    hessian = thin @ thin.T  # rank 3 of 12
    hessian[5] = hessian[:, 5] = 0  # and an input that never occurs
    weight = torch.randn(10, 12, generator=generator, dtype=torch.float64)
    up, down, _ = factor(weight, 4, hessian, torch.zeros(10, 10), damping=1e-6)
    error = weight - up @ down
    assert torch.isfinite(error).all()
    # Rank 4 covers all three directions that occur, up to what the damping leaves.
    assert cost(error, hessian, None) < 1e-4 * cost(weight, hessian, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_computes_in_double_whatever_comes_in(dtype):
    weight, hessian, output_moment, _ = problem(6, 8, 7, True, True)
    low = factor(weight.to(dtype), 3, hessian.to(dtype), output_moment.to(dtype))
    high = factor(*(x.to(dtype).double() if torch.is_tensor(x) else x for x in (weight, 3, hessian, output_moment)))
    for a, b in zip(low, high, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_nan_weight_names_the_layer():
    weight = torch.ones(3, 3)
    weight[1, 1] = float("nan")
    with pytest.raises(UserError, match=r"layers\.2\.self_attn\.q_proj holds NaN"):
        factor(weight, 1, name="layers.2.self_attn.q_proj")


@pytest.mark.parametrize(
    ("ratio", "m", "n", "rank"),
    [
        (0.25, 4096, 4096, 512),  # the paper's setting on Llama-2-7B
        (0.25, 576, 576, 72),
        (0.25, 192, 576, 36),
        (0.25, 3, 5, 1),  # floor(0.47) is 0
        (0.99, 64, 64, 31),
        (1.0, 64, 64, None),  # rank 32 of two 64-wide factors is the dense size: nothing saved
        (1.0, 64, 100, 39),  # floor(39.02): saves a little
        (0.25, 1, 8, None),  # rank 1 costs 9 for 8 weights
    ],
)
def test_rank_for(ratio, m, n, rank):
    assert rank_for(ratio, m, n) == rank


@given(ratio=st.floats(1e-6, 1), m=st.integers(1, 300), n=st.integers(1, 300))
def test_rank_for_never_costs_more_than_the_layer(ratio, m, n):
    rank = rank_for(ratio, m, n)
    if rank is not None:
        assert rank * (m + n) < m * n
        assert rank == 1 or rank * (m + n) <= ratio * m * n * (1 + 1e-12)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_keep_ratio_outside_is_refused(ratio):
    with pytest.raises(UserError, match="keep-ratio"):
        rank_for(ratio, 8, 8)
