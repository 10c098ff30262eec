"""How the bits of a matrix's walks lie in memory: exactly `bits` for each weight.

Strip after strip of rows, in it column after column, the bits of a walk from its first step to its last; the lowest
bit of a byte comes first. Strips have a multiple of 8 rows, but for the last one of some matrices, so that every walk
of the others begins at a whole byte.
"""

import torch
from torch import Tensor

STRIP = 256  # rows in a walk, fewer in the last strip


def stored_bytes(out_features: int, in_features: int, bits: int) -> int:
    """Bytes that the walks of a matrix take."""
    return -(-out_features * in_features * bits // 8)


def to_storage(symbols: Tensor, bits: int) -> Tensor:
    """`symbols` (out, in) uint8, `bits` bits each, as the stored bytes, (stored_bytes(...),) uint8."""
    place = torch.arange(bits, dtype=torch.uint8, device=symbols.device)
    streams = [(strip.T.reshape(-1, 1) >> place & 1).flatten() for strip in symbols.split(STRIP)]
    stream = torch.cat(streams)
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8, device=symbols.device)).sum(1, dtype=torch.uint8)


def from_storage(stored: Tensor, out_features: int, in_features: int, bits: int) -> Tensor:
    """Undo `to_storage`: symbols (out, in) uint8."""
    stream = stored[:, None] >> torch.arange(8, dtype=torch.uint8, device=stored.device) & 1
    stream = stream.flatten()[: out_features * in_features * bits].view(-1, bits)
    symbols = (stream << torch.arange(bits, dtype=torch.uint8, device=stored.device)).sum(1, dtype=torch.uint8)
    strips = symbols.split(STRIP * in_features)
    return torch.cat([strip.view(in_features, -1).T for strip in strips])
