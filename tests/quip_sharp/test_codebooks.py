"""The points, the search against brute force, and the distortion on Gaussian numbers."""

from functools import cache

import numpy as np
import pytest
import torch
from casp_quip_sharp.codebooks import (
    GAUSSIAN_SCALE,
    SHORT,
    STAGES,
    decode,
    half_patterns,
    pattern_index,
    table,
)
from casp_quip_sharp.search import nearest_e8, nearest_e8p, nearest_e8p_reference, quantize_vectors


def is_in_e8(points):
    """Whether all coordinates are whole or all are half-integer, and their sum is even."""
    whole = (points == points.round()).all(1)
    half = (points - 0.5 == (points - 0.5).round()).all(1)
    return (whole | half) & (points.sum(1) % 2 == 0)


def test_e8p_is_65536_points_of_the_shifted_lattice():
    points = table("e8p").double() / 4
    assert points.unique(dim=0).shape == (65536, 8)
    assert is_in_e8(points - 0.25).all()
    half = points - torch.where(torch.arange(65536) >= 32768, -0.25, 0.25)[:, None]
    norms, counts = half.square().sum(1).unique(return_counts=True)
    assert norms.tolist() == [2, 4, 6, 8, 10, 12]
    assert counts.sum() == 65536
    assert counts[-1] == 29 * 256


def test_patterns():
    patterns = half_patterns()
    assert len(np.unique(patterns, axis=0)) == 256
    norms = (patterns**2).sum(1)
    assert (norms[:SHORT] <= 10).all()
    assert (norms[SHORT:] == 12).all()
    assert (pattern_index() >= 0).sum() == 256


def test_small_codebook_is_256_points_of_e8():
    points = table("e8").double() / 4
    assert points.unique(dim=0).shape == (256, 8)
    assert is_in_e8(points).all()
    assert torch.bincount(points.square().sum(1).long()).tolist() == [1, 0, 240, 0, 15]


@pytest.fixture(scope="module")
def vectors():
    """Inliers, far outliers, the origin, axes, and vectors near the border between the two shifts."""
    generator = torch.Generator().manual_seed(0)
    near = torch.randn(200, 8, generator=generator)
    far = 3 * torch.randn(60, 8, generator=generator)
    axes = torch.cat([torch.eye(8), -5 * torch.eye(8)])
    border = table("e8p")[torch.randint(0, 65536, (60,), generator=generator)].float() / 4
    border = border + 0.24 * border.sign()
    return torch.cat([near, far, axes, border, torch.zeros(1, 8)])


@pytest.fixture(scope="module")
def shortest_distance(vectors):
    """Distance of each vector to the nearest point, by brute force over a whole codebook; each is searched once."""

    @cache
    def measure(codebook):
        points = table(codebook).double() / 4
        return torch.cdist(vectors.double(), points, compute_mode="donot_use_mm_for_euclid_dist").amin(1)

    return measure


@pytest.mark.parametrize(
    ("search", "stage"),
    [(nearest_e8p_reference, STAGES[2][0]), (nearest_e8p, STAGES[2][0]), (nearest_e8, STAGES[1][0])],
    ids=["reference", "compiled", "e8"],
)
def test_search_finds_a_nearest_point(vectors, shortest_distance, search, stage):
    codes = search(vectors)
    assert codes.dtype == stage.dtype
    found = (vectors - decode(codes, stage)).double().norm(dim=1)
    assert torch.allclose(found, shortest_distance(stage.codebook), atol=1e-5)


def test_a_point_is_its_own_nearest():
    codes = torch.arange(0, 65536, 7).to(torch.int16)
    assert torch.equal(nearest_e8p(decode(codes, STAGES[2][0])), codes)
    assert torch.equal(nearest_e8p_reference(decode(codes[::8], STAGES[2][0])), codes[::8])


@pytest.mark.parametrize(("bits", "limit"), [(1, 0.322), (2, 0.0916), (3, 0.0296), (4, 0.0090)])
def test_distortion_of_gaussian_numbers(bits, limit):
    count = 120_000 if bits in (2, 4) else 60_000
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(11))
    x = x / x.square().mean().sqrt()
    scale = GAUSSIAN_SCALE[bits]
    codes, points = quantize_vectors(x / scale, bits)
    assert [code.dtype for code in codes] == [stage.dtype for stage in STAGES[bits]]
    decoded = sum(decode(code, stage) for code, stage in zip(codes, STAGES[bits], strict=True))
    assert torch.equal(decoded, points)
    error = (x - scale * points).square().mean().item()
    assert error <= limit
    for other in (0.93, 1.07):
        _, points = quantize_vectors(x[:20_000] / (scale * other), bits)
        assert (x[:20_000] - scale * other * points).square().mean().item() > 0.99 * error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_search_on_cuda(vectors):
    stage = STAGES[2][0]
    there = decode(nearest_e8p(vectors.cuda()).cpu(), stage)
    assert torch.allclose((vectors - there).norm(dim=1), (vectors - decode(nearest_e8p(vectors), stage)).norm(dim=1))
