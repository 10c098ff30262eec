"""The tables of the trellis: what each state stands for, made by `casp_quip_sharp.trellis.train`.

A state of L bits is mapped to an entry by a linear map over GF(2): bit i of the entry's number is the parity of the
state's bits under a mask. So the code is a classic convolutional one whose outputs are labelled freely; on a CPU that
has it the map is one instruction, and a table of at most 64 bytes is looked up by another.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from casp.errors import UserError

UNIT = 1 / 64  # of the stored whole numbers; a power of two, so that every float type holds the values exactly
FILE = Path(__file__).with_name("tables.json")


@dataclass(frozen=True)
class Table:
    """A table for states of `states` bits read `bits` at a time.

    masks: of the states' bits, one for each bit of an entry's number; entries: (2^len(masks)) whole numbers of 8 bits
    in units of 1/64, the second half minus the first; scale: at which N(0, 1) is met with the least mean squared error;
    nmse: that error.
    """

    states: int
    bits: int
    masks: tuple[int, ...]
    entries: tuple[int, ...]
    scale: float
    nmse: float

    def entry_numbers(self) -> Tensor:
        """The number of the entry of every state, (2^states) int64."""
        return entry_numbers(self.states, self.masks)

    def kernel_tensors(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Entries, int8, and masks, uint8, as quiptools takes them; entries by state, and no masks, for wide states."""
        return _kernel_tensors(self, device)

    def values(self, device: torch.device | str = "cpu") -> Tensor:
        """What every state stands for, (2^states) float32."""
        return (torch.tensor(self.entries)[self.entry_numbers()].float() * UNIT).to(device)


def entry_numbers(states: int, masks: tuple[int, ...]) -> Tensor:
    """The parities of every state's bits under `masks`, the first lowest: (2^states) int64."""
    state = torch.arange(1 << states)
    number = torch.zeros_like(state)
    for i, mask in enumerate(masks):
        parity = state & mask
        for shift in (8, 4, 2, 1):
            parity ^= parity >> shift
        number |= (parity & 1) << i
    return number


@cache
def _kernel_tensors(table: Table, device: torch.device) -> tuple[Tensor, Tensor | None]:
    entries = torch.tensor(table.entries, dtype=torch.int8)
    if table.states > 8:
        return entries[table.entry_numbers()].to(device), None
    return entries.to(device), torch.tensor(table.masks, dtype=torch.uint8, device=device)


@cache
def _tables() -> dict[tuple[int, int], Table]:
    tables = [
        Table(**{**entry, "masks": tuple(entry["masks"]), "entries": tuple(entry["entries"])})
        for entry in json.loads(FILE.read_text())
    ]
    return {(table.states, table.bits): table for table in tables}


def table(states: int, bits: int) -> Table:
    """The table that comes with the package; UserError where there is none."""
    try:
        return _tables()[states, bits]
    except KeyError:
        rates = sorted(found_bits for found_states, found_bits in _tables() if found_states == states)
        if rates:
            raise UserError(f"--bits {bits} is not a rate of the trellis; use {', '.join(map(str, rates))}.") from None
        known = sorted({found_states for found_states, _ in _tables()})
        raise UserError(
            f"--trellis-states {states} is no size of the trellis; use {', '.join(map(str, known))}."
        ) from None


@cache
def values(states: int, bits: int, device: torch.device) -> Tensor:
    """What every state of the package's table stands for, (2^states) float32."""
    return table(states, bits).values(device)


def rates(states: int) -> list[int]:
    """Bits a weight that there are tables for, ascending."""
    return sorted(bits for found, bits in _tables() if found == states)
