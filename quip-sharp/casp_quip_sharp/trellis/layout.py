"""How the bits of a matrix's walks lie in memory: exactly `bits` for each weight.

Strip after strip of rows, in it column after column, the bits of a walk from its first step to its last; the lowest
bit of a byte comes first. Where a walk is whole bytes (a strip of a multiple of 8 rows: all but the last one of some
matrices), those of four columns are interleaved byte by byte, so that a kernel has four weights of a row in one word;
the last columns of an `in` that is no multiple of 4 are interleaved among themselves.
"""

import torch
from torch import Tensor

STRIP = 256  # rows in a walk, fewer in the last strip
WAY = 4  # columns whose bytes are interleaved


def stored_bytes(out_features: int, in_features: int, bits: int) -> int:
    """Bytes that the walks of a matrix take."""
    return -(-out_features * in_features * bits // 8)


def _interleaved(plain: Tensor) -> Tensor:
    """The bytes of a strip (in, bytes) in the order in which they are stored."""
    whole = len(plain) // WAY * WAY
    ways = plain[:whole].view(-1, WAY, plain.shape[1]).transpose(1, 2)
    return torch.cat([ways.flatten(), plain[whole:].T.flatten()])


def _separated(stored: Tensor, in_features: int) -> Tensor:
    """Undo `_interleaved`: (in, bytes)."""
    size = len(stored) // in_features
    whole = in_features // WAY * WAY
    ways = stored[: whole * size].view(-1, size, WAY).transpose(1, 2).reshape(whole, size)
    return torch.cat([ways, stored[whole * size :].view(size, -1).T])


def to_storage(symbols: Tensor, bits: int) -> Tensor:
    """`symbols` (out, in) uint8, `bits` bits each, as the stored bytes, (stored_bytes(...),) uint8."""
    place = torch.arange(bits, dtype=torch.uint8, device=symbols.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=symbols.device)
    parts = []
    for strip in symbols.split(STRIP):
        stream = (strip.T.reshape(-1, 1) >> place & 1).flatten()
        stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
        plain = (stream << shifts).sum(1, dtype=torch.uint8)
        parts.append(_interleaved(plain.view(symbols.shape[1], -1)) if len(strip) % 8 == 0 else plain)
    return torch.cat(parts)


def from_storage(stored: Tensor, out_features: int, in_features: int, bits: int) -> Tensor:
    """Undo `to_storage`: symbols (out, in) uint8."""
    place = torch.arange(bits, dtype=torch.uint8, device=stored.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=stored.device)
    strips, begin = [], 0
    for first in range(0, out_features, STRIP):
        rows = min(STRIP, out_features - first)
        part = stored[begin : begin + stored_bytes(rows, in_features, bits)]
        begin += len(part)
        plain = _separated(part, in_features).flatten() if rows % 8 == 0 else part
        stream = (plain[:, None] >> shifts & 1).flatten()[: rows * in_features * bits].view(-1, bits)
        strips.append((stream << place).sum(1, dtype=torch.uint8).view(in_features, -1).T)
    return torch.cat(strips)
