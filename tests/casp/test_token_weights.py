"""Token weights in closed form: attention received, the norms of gradients, names of sums."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casp.errors import UserError
from casp.model.attention import AttentionCall
from casp.moments.weights import attention_received, gradient_weights, typical_energy, weighting_parts


def test_uniform_attention_weighs_all_tokens_alike():
    call = AttentionCall(torch.zeros(2, 4, 9, 8), torch.randn(2, 2, 9, 8), None, 1.0)
    weights = attention_received(call, torch.ones(2, 9, dtype=torch.bool))
    assert torch.allclose(weights, torch.ones(2, 9))


def test_a_token_that_nobody_looks_at_weighs_nothing_and_one_that_all_look_at_is_bounded():
    key = torch.zeros(1, 1, 12, 4)
    key[0, 0, 3, 0], key[0, 0, 5, 0] = -60.0, 60.0
    query = torch.zeros(1, 2, 12, 4)
    query[..., 0] = 1.0
    weights = attention_received(AttentionCall(query, key, None, 1.0), torch.ones(1, 12, dtype=torch.bool))
    # Query 3 itself still spreads over keys 0 to 2, and no query from 5 on looks elsewhere than at key 5.
    assert weights[0, 3] < 1e-6
    assert weights[0, 5] == 4.0
    assert (weights[0, 6:] < 1e-6).all()


@pytest.mark.parametrize("form", ["boolean", "additive", "causal"])
def test_visible_keys_whatever_form_the_mask_has(form):
    expected = torch.ones(1, 5, 5, dtype=torch.bool).tril()
    additive = torch.zeros(1, 1, 5, 5).masked_fill(~expected[:, None], torch.finfo(torch.float32).min)
    mask = {"boolean": expected[:, None], "additive": additive, "causal": None}[form]
    call = AttentionCall(torch.randn(1, 4, 5, 8) * 50, torch.randn(1, 2, 5, 8) * 50, mask, 1.0)
    assert torch.equal(call.visible(), expected)


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-12, 1.0, 1e4]), part=st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=40)
def test_weights_by_gradient(seed, scale, part):
    """In units of each sequence's mean, clipped; padding and what lies in it count for nothing."""
    name, most = {1: ("gradient-norm", 10.0), 2: ("gradient", 20.0)}[part]
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(3, 40, 6, generator=generator) * scale
    gradient[0, 3] *= 1000  # beyond the clip
    gradient[2] = 0  # a sequence without a loss
    tokens = torch.ones(3, 40, dtype=torch.bool)
    tokens[1, 25:] = False
    gradient[1, 25:] = 1e9 * scale
    found = gradient_weights(name, gradient, tokens)
    size = gradient.double().norm(dim=-1) ** part
    for row, kept in ((0, slice(0, 40)), (1, slice(0, 25))):
        expected = (size[row, kept] / size[row, kept].mean()).clamp_max(most)
        torch.testing.assert_close(found[row, kept].double(), expected, rtol=1e-4, atol=1e-6)
    assert found[0, 3] == most
    assert (found[1, 25:] == 0).all()
    assert (found[2] == 0).all()


@pytest.mark.parametrize("wrong", ["attention+", "gradients", "attention+attention", "", "none, attention"])
def test_a_misspelt_weighting_is_named(wrong):
    with pytest.raises(UserError, match="--token-weights"):
        weighting_parts(wrong)


def test_parts_of_a_sum():
    assert weighting_parts("attention+gradient") == ("attention", "gradient")
    assert weighting_parts("none") == ("none",)


def test_windows_of_text_and_chats_have_a_typical_energy_each():
    """An outlier counts 4 times the median of its kind; windows of text, all of them strong, are no outliers."""
    energies = torch.tensor([1.0, 1.0, 50.0, 0.0, 1000.0, 1000.0])
    counts = torch.tensor([10, 20, 10, 5, 30, 25])
    chats = torch.tensor([True, True, True, True, False, False])
    expected = (10 + 20 + 4 * 10 + 1000 * (30 + 25)) / 100
    assert typical_energy(energies, counts, chats) == pytest.approx(expected)
    assert typical_energy(torch.zeros(6), counts, chats) == 0
