"""The header of a safetensors file, checked against the file before anything of it is read or allocated.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the length of the header, the header as
JSON, the data. Each tensor gives its type, shape and the place of its bytes; together they cover the data without a
gap and without sharing a byte.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch

from casp.errors import UserError
from casp.reading.documents import parse_json
from casp.reading.files import require_file

MOST_BYTES = 16 << 20  # a hundred thousand tensors
MOST_DIMENSIONS = 16
REMEDY = "download or write it again"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of the types that are read here."""
WEIGHTS = ("F64", "F32", "F16", "BF16")
"""Those that a weight may have."""


@dataclass(frozen=True)
class Entry:
    """Where one stored tensor lies: its shard, dtype (safetensors' name), shape and size in bytes."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _place(shard: Path, name: str, tensor: Any) -> tuple[int, int, Entry]:
    """Begin and end of a tensor within the data, and its entry."""
    of = f"{name} in {shard}"
    if not isinstance(tensor, dict) or not {"dtype", "shape", "data_offsets"} <= tensor.keys():
        raise UserError(f"{of} lacks its type, shape or place: a damaged header; {REMEDY}.")
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{of} is stored as {str(dtype)[:20]!r}, a type that is not read here; {REMEDY}.")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(map(_is_count, shape)):
        raise UserError(f"{of} has no valid shape: a damaged header; {REMEDY}.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise UserError(f"{of} has no valid place: a damaged header; {REMEDY}.")
    begin, end = offsets
    if end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise UserError(f"{of} has {end - begin} bytes, which is not what its type and shape take; {REMEDY}.")
    return begin, end, Entry(shard, dtype, tuple(shape), end - begin)


def read_header(shard: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file by its name; UserError for a file that is not one, whole and consistent."""
    entries, _ = read_header_with_metadata(shard)
    return entries


def read_header_with_metadata(shard: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """As `read_header`, and the texts that the header holds besides."""
    size = require_file(shard, "the shard")
    with shard.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or not 2 <= length <= size - 8:
            raise UserError(f"{shard} is truncated or not a safetensors file; {REMEDY}.")
        if length > MOST_BYTES:
            raise UserError(f"{shard} has a header of {length} bytes, at most {MOST_BYTES} are read; {REMEDY}.")
        text = file.read(length)
    header = parse_json(text, f"{shard} has a damaged header: it", REMEDY, unique=True)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{shard} has a damaged header: its metadata are not texts; {REMEDY}.")
    places = {name: _place(shard, name, tensor) for name, tensor in header.items()}
    ordered = sorted(places.values(), key=lambda place: place[:2])
    end = ordered[-1][1] if ordered else 0
    if 8 + length + end > size:
        raise UserError(f"{shard} is truncated ({size} of {8 + length + end} bytes); {REMEDY}.")
    touching = all(before[1] == after[0] for before, after in pairwise(ordered))
    if not touching or (ordered and ordered[0][0]) or 8 + length + end != size:
        raise UserError(f"{shard} has a damaged header: its tensors overlap or leave gaps; {REMEDY}.")
    return {name: entry for name, (_, _, entry) in places.items()}, metadata
