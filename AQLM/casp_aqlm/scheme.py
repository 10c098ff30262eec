"""How a weight is stored: additive codebooks and their sizes, and the exact tensors that follow from them.

Egiazarian et al. 2024, arXiv 2401.06118: each group of g neighbouring weights of a row is the sum of M codewords, one
of each codebook of 2^B entries, times a scale of the row. Written MxBgG, as 2x8g8: (M B) / g bits a weight of codes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from casp.errors import UserError

ENTRY_DTYPES = {"float16": torch.float16, "int8": torch.int8, "float8": torch.float8_e4m3fn}
"""What codebooks are stored as. Those of int8 are whole numbers, in a unit that the scales of the rows hold."""
_EXAMPLES = "2x8g8, 1x8g8, 1x8g4, 3x8g12, 2x12g8, 4x8g8, 1x16g8"
_MOST_ENTRY_BITS, _MOST_GROUP, _MOST_CODEBOOKS = 16, 32, 8


@dataclass(frozen=True)
class Scheme:
    """M `codebooks` of 2 ** `code_bits` entries over `group` neighbouring input weights; `entries`: their dtype."""

    codebooks: int
    code_bits: int
    group: int
    entries: str = "float16"

    @classmethod
    def parse(cls, text: str, entries: str = "float16") -> "Scheme":
        """The scheme that `text` writes as MxBgG; UserError when it writes none, or one out of range."""
        match = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})g([0-9]{1,4})", text)
        if match is None:
            raise UserError(
                f"scheme {text[:40]!r} is not of the form MxBgG (M codebooks, B bits a code, groups of G weights); "
                f"examples: {_EXAMPLES}."
            )
        scheme = cls(*map(int, match.groups()), entries)
        limits = (_MOST_CODEBOOKS, _MOST_ENTRY_BITS, _MOST_GROUP)
        values = (scheme.codebooks, scheme.code_bits, scheme.group)
        if any(not 1 <= value <= limit for value, limit in zip(values, limits, strict=True)):
            raise UserError(
                f"scheme {text} is out of range: 1 to {limits[0]} codebooks, 1 to {limits[1]} bits a code, groups of 1 "
                f"to {limits[2]} weights; examples: {_EXAMPLES}."
            )
        if entries not in ENTRY_DTYPES:
            raise UserError(f"codebooks of {entries!r} are not stored; use {' or '.join(ENTRY_DTYPES)}.")
        return scheme

    @classmethod
    def of(cls, format: Mapping[str, Any]) -> "Scheme":
        """The scheme of a format, {"scheme": "2x8g8", "entries": a key of ENTRY_DTYPES, ...}."""
        scheme = cls.parse(format["scheme"], format["entries"])
        if format.get("bits", scheme.bits) != scheme.bits:
            raise UserError(f"scheme {scheme} has {scheme.bits:g} bits a weight, not {str(format['bits'])[:40]}.")
        return scheme

    def __str__(self) -> str:
        return f"{self.codebooks}x{self.code_bits}g{self.group}"

    @property
    def size(self) -> int:
        """Entries of a codebook."""
        return 2**self.code_bits

    @property
    def bits(self) -> float:
        """Bits of codes a weight, without codebooks and scales."""
        return self.codebooks * self.code_bits / self.group

    @property
    def format(self) -> dict[str, Any]:
        """The JSON description of a layer in this scheme."""
        return {"bits": self.bits, "scheme": str(self), "entries": self.entries}

    def groups(self, in_features: int) -> int:
        """Groups of a row: the last may reach beyond it, over weights that are 0."""
        return -(-in_features // self.group)

    def padded(self, in_features: int) -> int:
        """Columns of all groups."""
        return self.groups(in_features) * self.group

    def tensor_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of every tensor that a layer of this scheme stores, bias aside."""
        codes = self.groups(in_features) * self.codebooks * self.code_bits
        return {
            "codes": ((out_features, -(-codes // 8)), torch.uint8),
            "codebooks": ((self.codebooks, self.size, self.group), ENTRY_DTYPES[self.entries]),
            "scales": ((out_features,), torch.float16),
        }
