"""The packed int32 layout that auto-gptq made standard, read by gptqmodel, transformers and vLLM.

Along the packed axis, 32 codes fill `bits` words as one little-endian bit string: code i has its lowest bit at
bit `i * bits`. For 2, 4 and 8 bits no code crosses a word; for 3 bits codes 10 and 21 of every 32 do. That is
gptqmodel's "continuous" layout for all four widths. `qweight` is packed along the inputs, `qzeros` along the
outputs. Zeros are stored as they are ("gptq_v2"): the older "gptq" stores them less one, which has no place for
a zero of 0.
"""

import torch
from torch import Tensor

RUN = 32  # codes that fill a whole number of words at every bit width
_WORD = 32


def packed_rows(length: int, bits: int) -> int:
    """Words along the packed axis for `length` codes; a length that is no multiple of 32 is padded up to one."""
    return -(-length // RUN) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the first axis: codes (n, ...) of any integer dtype -> int32 (packed_rows(n, bits), ...).

    Codes must be below 2^bits. What pads n to a multiple of 32 is zero.
    """
    length, rest = codes.shape[0], codes.shape[1:]
    runs = -(-length // RUN)
    padded = codes.new_zeros((runs * RUN, *rest), dtype=torch.int64)
    padded[:length] = codes
    padded = padded.view(runs, RUN, *rest)
    words = padded.new_zeros((runs, bits, *rest))
    for i in range(RUN):
        word, shift = divmod(i * bits, _WORD)
        words[:, word] |= (padded[:, i] << shift) & 0xFFFFFFFF
        if shift + bits > _WORD:
            words[:, word + 1] |= padded[:, i] >> (_WORD - shift)
    signed = torch.where(words >= 2**31, words - 2**32, words)
    return signed.to(torch.int32).view(runs * bits, *rest)


def unpack(words: Tensor, bits: int, length: int) -> Tensor:
    """Undo `pack`: int32 (packed_rows(length, bits), ...) -> uint8 codes (length, ...)."""
    rest = words.shape[1:]
    words = words.reshape(-1, bits, *rest)
    codes = []
    for i in range(RUN):
        word, shift = divmod(i * bits, _WORD)
        here = min(_WORD - shift, bits)  # bits of the code that lie in its first word
        # The shift of a negative word brings in ones from above; the mask removes them.
        code = (words[:, word] >> shift) & ((1 << here) - 1)
        if here < bits:
            code = code | (words[:, word + 1] & ((1 << (bits - here)) - 1)) << here
        codes.append(code.to(torch.uint8))
    return torch.stack(codes, 1).reshape(-1, *rest)[:length]
