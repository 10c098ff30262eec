"""The grid: its end points, its zero, the clip search."""

import pytest
import torch
from casp_gptq.grid import find_grid, gaussian_distortion, group_bounds, to_codes
from hypothesis import given, settings
from hypothesis import strategies as st


def squared_error(values, scales, zeros, bits):
    codes = to_codes(values, scales[:, None], zeros[:, None], bits)
    return (scales[:, None] * (codes - zeros[:, None]) - values).square()


def test_groups_that_do_not_divide_the_width():
    assert group_bounds(576, 128) == [(0, 128), (128, 256), (256, 384), (384, 512), (512, 576)]
    assert group_bounds(36, 64) == [(0, 36)]
    assert group_bounds(36, -1) == [(0, 36)]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.integers(0, 25),
    st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=20),
)
def test_what_a_grid_always_is(bits, symmetric, clip_steps, row):
    values = torch.tensor([row])
    scales, zeros = find_grid(values, bits, symmetric, clip_steps)
    assert (scales > 0).all()
    assert torch.equal(scales, scales.half().float())
    assert 0 <= zeros.item() <= 2**bits - 1
    assert zeros.item() == int(zeros.item())
    if symmetric:
        assert zeros.item() == 2 ** (bits - 1)
    full = find_grid(values, bits, symmetric, 0)
    assert squared_error(values, scales, zeros, bits).sum() <= squared_error(values, *full, bits).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_plain_grid_spans_minimum_to_maximum(bits):
    values = torch.linspace(-1, 2, 50)[None]
    scales, zeros = find_grid(values, bits, False, 0)
    assert scales.item() == pytest.approx(3 / (2**bits - 1), rel=1e-3)
    assert zeros.item() == round((2**bits - 1) / 3)


def test_clipping_pays_at_two_bits():
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    plain, searched = find_grid(values, 2, False, 0), find_grid(values, 2, False, 20)
    assert squared_error(values, *searched, 2).sum() < 0.75 * squared_error(values, *plain, 2).sum()


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, False), (4, False), (4, True), (8, False)])
def test_the_clip_search_is_hardly_worse_than_all_its_steps_tried(bits, symmetric):
    """Brute force in float64 over every step and, at few bits, every neighbouring zero."""
    values = torch.randn(200, 64, generator=torch.Generator().manual_seed(bits)).pow(3)
    low, high = values.amin(1).clamp(max=0).double(), values.amax(1).clamp(min=0).double()
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    top = 2**bits - 1
    full = (high - low) / top
    middle = (-low / full).round() if not symmetric else torch.full_like(low, 2 ** (bits - 1))
    least = torch.full_like(low, torch.inf)
    for step in range(21):
        scales = (full * (1 - 0.8 * step / 20)).half().double()
        for shift in (-1, 0, 1) if bits <= 3 and not symmetric else (0,):
            zeros = (middle + shift).clamp(0, top)
            least = torch.minimum(least, squared_error(values.double(), scales, zeros, bits).sum(1))
    found = squared_error(values.double(), *find_grid(values, bits, symmetric, 20), bits).sum(1)
    assert (found >= least * (1 - 1e-5)).all()
    assert found.sum() < 1.01 * least.sum()


def test_importance_moves_the_grid_to_the_columns_that_matter():
    values = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(32)
    importance[:4] = 1000
    heard, even = find_grid(values, 2, False, 20, importance), find_grid(values, 2, False, 20)
    assert squared_error(values, *heard, 2)[:, :4].sum() < squared_error(values, *even, 2)[:, :4].sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_distortion_of_gaussian_numbers(bits):
    """Many columns to a grid: the least there is for a Gaussian with zero among the codes, by integration; few columns,
    whose grids follow them: less with each halving.
    """
    x = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2) * 16 / 20_000 / (2 * torch.pi) ** 0.5
    least = min(
        (((x / step).round().clamp(-zero, 2**bits - 1 - zero) * step - x).square() * density).sum().item()
        for step in torch.linspace(0.05, 2, 400).tolist()
        for zero in range(2**bits)
    )
    assert least * 0.98 < gaussian_distortion(bits, 1 << 14, 20) < least * 1.05
    fewer = [gaussian_distortion(bits, columns, 20) for columns in (8, 16, 32, 64, 128)]
    assert fewer == sorted(fewer)
    assert len(set(fewer)) == 5
