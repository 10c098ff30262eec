"""Packed codes: every width, round trip, exact bytes, against bit strings."""

import torch
from casp_aqlm.packing import pack, unpack
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(1, 16), st.integers(1, 5), st.integers(1, 13), st.integers(0, 2**31))
def test_packed_codes_are_the_bits_of_their_row_in_order(bits, rows, count, seed):
    codes = torch.randint(0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-count * bits // 8))
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (place * bits) for place, code in enumerate(row))
        assert int.from_bytes(bytes(stored), "little") == number
    assert torch.equal(unpack(packed, bits, count), codes.int())
