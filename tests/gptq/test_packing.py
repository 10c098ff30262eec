"""The packed layout: round trips, and constants worked out by hand from gptqmodel's layout."""

import pytest
import torch
from casp_gptq.packing import pack, packed_rows, unpack
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 130), st.integers(1, 5), st.integers(0, 2**31))
def test_unpack_undoes_pack(bits, length, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (length, columns), generator=generator, dtype=torch.uint8)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (packed_rows(length, bits), columns)
    assert torch.equal(unpack(words, bits, length), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_one_little_endian_bit_string(bits):
    codes = torch.randint(0, 2**bits, (64,), generator=torch.Generator().manual_seed(bits))
    whole = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    words = [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(2 * bits)]
    assert [int(word) & 0xFFFFFFFF for word in pack(codes, bits)] == words


def test_three_bits_across_words_as_gptqmodel_has_them():
    # Code 10 leaves its lowest two bits in the first word, code 21 its lowest bit in the second.
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[10], codes[21] = 0b101, 0b011
    low, middle, high = (int(word) & 0xFFFFFFFF for word in pack(codes, 3))
    assert (low, middle, high) == (0b01 << 30, (0b1 << 0) | (0b1 << 31), 0b01)


def test_the_highest_code_in_the_highest_place_survives_the_sign_bit():
    for bits in (2, 4, 8):
        codes = torch.full((32, 1), 2**bits - 1, dtype=torch.uint8)
        assert pack(codes, bits).unique().tolist() == [-1]
        assert torch.equal(unpack(pack(codes, bits), bits, 32), codes)
