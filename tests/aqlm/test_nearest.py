"""Nearest sums of codewords against brute force, compiled and plain."""

import itertools

import pytest
import torch
from casp_aqlm.nearest import Search, pairs_by_numba, pairs_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from casp.kernels import operators

SEARCHES = [Search(compiled=False), Search(compiled=True)]


def distances(targets, codebooks, codes):
    found = sum(codebook[code] for codebook, code in zip(codebooks, codes.T, strict=True))
    return (targets - found).double().square().sum(1)


def brute_force(targets, codebooks):
    """Smallest squared distance of each target to any sum of one entry of each codebook."""
    sums = torch.stack([sum(parts) for parts in itertools.product(*codebooks.double())])
    return torch.cdist(targets.double(), sums).min(1)[0].square()


@pytest.mark.parametrize("search", SEARCHES, ids=["plain", "compiled"])
@given(st.sampled_from([1, 2]), st.sampled_from([2, 4, 16, 64]), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_one_and_two_codebooks_are_searched_exactly(search, count, size, group, seed):
    generator = torch.Generator().manual_seed(seed)
    codebooks = torch.randn(count, size, group, generator=generator)
    targets = torch.randn(70, group, generator=generator)
    codes = search.sums(targets, codebooks)
    assert codes.shape == (70, count)
    best = brute_force(targets, codebooks)
    assert torch.allclose(distances(targets, codebooks, codes), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("search", SEARCHES, ids=["plain", "compiled"])
@pytest.mark.parametrize("size", [256, 1024, 65536])
def test_a_large_codebook_is_searched_exactly(search, size):
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(1, size, 8, generator=generator)
    targets = torch.randn(40, 8, generator=generator)
    best = torch.cdist(targets.double(), codebook[0].double()).min(1)[0].square()
    assert torch.allclose(distances(targets, codebook, search.sums(targets, codebook)), best, rtol=1e-4)


def test_plain_and_compiled_agree_on_trained_sizes():
    generator = torch.Generator().manual_seed(1)
    codebooks, targets = torch.randn(2, 256, 8, generator=generator), torch.randn(200, 8, generator=generator)
    plain, compiled = (distances(targets, codebooks, search.sums(targets, codebooks)) for search in SEARCHES)
    assert torch.allclose(plain, compiled, rtol=1e-4)


@pytest.mark.parametrize(("count", "size"), [(3, 16), (4, 16), (2, 1024)])
def test_more_than_can_be_searched_exactly_comes_close_and_never_loses_what_it_started_from(count, size):
    generator = torch.Generator().manual_seed(2)
    scales = 0.5 ** torch.arange(count)
    codebooks = torch.randn(count, size, 4, generator=generator) * scales[:, None, None]
    targets = torch.randn(200, 4, generator=generator)
    search = Search()
    fresh = distances(targets, codebooks, search.sums(targets, codebooks))
    greedy, left = [], targets
    for codebook in codebooks:
        greedy.append(search.entries(left, codebook))
        left = left - codebook[greedy[-1]]
    greedy = torch.stack(greedy, 1)
    assert fresh.mean() < distances(targets, codebooks, greedy).mean()
    if count > 2:
        improved = distances(targets, codebooks, search.sums(targets, codebooks, greedy))
        assert (improved <= distances(targets, codebooks, greedy) * (1 + 1e-4) + 1e-6).all()
        assert fresh.mean() < 1.5 * brute_force(targets, codebooks).mean()


@pytest.mark.skipif(operators() is None, reason="quiptools is not built")
@given(st.sampled_from([16, 48, 64, 256]), st.integers(1, 9), st.integers(1, 75), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_all_instruction_sets_and_numba_find_the_same_pairs(size, group, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    codebooks = torch.randn(2, size, group, generator=generator)
    targets = 2 * torch.randn(rows, group, generator=generator)
    best = distances(targets, codebooks, pairs_reference(targets, codebooks))
    found = {name: operators().aqlm_nearest_pairs(targets, codebooks, name) for name in operators().instruction_sets()}
    for codes in (*found.values(), pairs_by_numba(targets, codebooks)):
        assert torch.allclose(distances(targets, codebooks, codes), best, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(operators() is None, reason="quiptools is not built")
def test_what_the_compiled_search_cannot_take_is_refused():
    for codebooks in (
        torch.randn(2, 20, 8),
        torch.randn(3, 16, 8),
        torch.randn(2, 16, 7),
        torch.randn(2, 16, 8).half(),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            operators().aqlm_nearest_pairs(torch.randn(5, 8), codebooks)
