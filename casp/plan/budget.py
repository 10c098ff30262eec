"""How many bytes a plan may spend: bits a weight or a size, of the linears alone or of the whole checkpoint."""

import re

from casp.errors import UserError
from casp.model.decoder import Decoder

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_MOST = 10**15


def parse_size(text: str) -> int:
    """Bytes of "30MB", "1.5 GB", "700MiB" or "123456"; UserError for anything else."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = (found.group(2) or "B").upper() if found else ""
    size = float(found.group(1)) * _UNITS[unit] if unit in _UNITS else 0.0
    if not 1 <= size <= _MOST:
        raise UserError(f"--size {text[:40]} is no size from 1 byte to 1e15; write it as 30MB, 1.5GB or 700MiB.")
    return int(size)


def other_bytes(decoder: Decoder) -> int:
    """Bytes of everything in the checkpoint that no plan touches: embeddings, norms, biases, head, vision tower."""
    linears = {
        f"{block}.{path}.weight" for i, block in enumerate(decoder.blocks) for path in decoder.linears(i).values()
    }
    kept = (name for name in decoder.shards.names("") if name not in linears)
    stored = {stored for name in kept for stored in decoder.shards.stored_names(name)}
    return sum(decoder.shards.entries[name].bytes for name in stored)


def byte_budget(decoder: Decoder, bits: float | None, size: str | None, whole: bool) -> int:
    """Bytes that all linears may take: `bits` an original weight, or `size`, of the `whole` checkpoint where asked for.

    UserError for numbers that make no budget.
    """
    if bits is not None:
        if not 0 < bits < 16:
            raise UserError(f"--bits {bits:g} is not between 0 and 16; 2.1, say, is usual.")
        allowed = int(bits * decoder.original_weights() / 8)
    else:
        allowed = parse_size(size)
    if not whole:
        return allowed
    other = other_bytes(decoder)
    if allowed <= other:
        raise UserError(
            f"what is not quantized takes {other / 1e6:.1f} MB of this checkpoint, the whole budget of "
            f"{allowed / 1e6:.1f} MB; allow more."
        )
    return allowed - other
