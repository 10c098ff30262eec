"""Codes of any width up to 16 bits, packed row by row without gaps.

Bit i of a row's code n is bit (n B + i) of the row, from the lowest bit of its first byte on; rows begin on a byte.
"""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n) of any integer dtype, 0 <= code < 2 ** bits, as (rows, ceil(n bits / 8)) uint8."""
    if bits == 8:
        return codes.to(torch.uint8)
    if bits == 16:
        low, high = codes & 255, codes >> 8 & 255
        return torch.stack([low, high], -1).flatten(1).to(torch.uint8)
    single = (codes[..., None] >> torch.arange(bits, device=codes.device) & 1).to(torch.uint8).flatten(1)
    padded = torch.nn.functional.pad(single, (0, -single.shape[1] % 8)).view(len(codes), -1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row of `packed` (rows, bytes) uint8: (rows, count) int32."""
    if bits == 8:
        return packed[:, :count].int()
    if bits == 16:
        pairs = packed[:, : 2 * count].reshape(len(packed), count, 2).int()
        return pairs[..., 0] | pairs[..., 1] << 8
    single = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    single = single.flatten(1)[:, : count * bits].view(len(packed), count, bits).int()
    return (single << torch.arange(bits, dtype=torch.int32, device=packed.device)).sum(-1, dtype=torch.int32)
