"""Make the tables of the trellis: `python -m casp_quip_sharp.trellis.train` writes tables.json anew.

For each rate and number of states a linear map from states to entries is looked for by drawing maps and changing
single masks of the best ones; what the entries stand for is found by Lloyd's iterations through the trellis: closed
walks of 256 steps are fitted to Gaussian numbers, then every entry becomes the mean of the numbers that chose it.
Entries are kept antisymmetric, half of them the negatives of the other half, which lets a kernel look half of them up.

The same seed gives the same bytes. Needs the kernels (quiptools).
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from casp.cli import Parser, run_main
from casp.errors import UserError
from casp.kernels import operators
from casp.numbers import seed as any_seed
from casp.reading.documents import read_json
from casp.reading.files import is_there
from casp.run.files import try_to_write, write_atomically
from casp.run.outputs import refuse_inputs
from casp_quip_sharp.trellis.layout import STRIP
from casp_quip_sharp.trellis.tables import FILE, UNIT, Table, entry_numbers
from casp_quip_sharp.trellis.walks import walk_states

LARGEST = 127  # of an entry
BITS_OF_ENTRIES = {1: 4, 2: 5, 3: 6, 4: 6, 5: 8, 6: 8}
"""Bits a weight -> bits of an entry's number. Up to 6 bits a table is one register of 64 bytes."""
STRETCH = {1: 1.0, 2: 1.0, 3: 1.1, 4: 1.25, 5: 1.4, 6: 1.5}
"""Bits a weight -> how much wider than N(0, 1) entries are to start from.

Where there is little to choose between, their density should fall as the cube root of what they stand for (Panter and
Dite, Proc. IRE 39, 1951), whose variance is three times as large; Lloyd's iterations move the outer ones slowly.
"""
MADE = [
    *((8, bits) for bits in range(1, 7)),
    *((10, bits) for bits in range(1, 5)),
    *((12, bits) for bits in range(1, 5)),
]
"""(states, bits) of the tables that the package holds."""


@dataclass(frozen=True)
class Effort:
    """The length of the search: walks to compare maps on, maps drawn, changed and kept, walks and rounds to train."""

    compared: int = 48
    drawn: int = 400
    changed: int = 1600
    kept: int = 6
    trained: int = 1024
    rounds: int = 15


SCALES = (0.96, 0.98, 1.0, 1.02, 1.04, 1.06)  # of the finished entries, of which the best is stored
EFFORTS = {8: Effort(), 10: Effort(drawn=150, changed=450), 12: Effort(32, 60, 200, trained=512)}
"""By states: a larger trellis takes longer and depends less on its map."""


def gaussian(walks: int, generator: torch.Generator) -> Tensor:
    """Independent N(0, 1), one walk below the other: (walks * STRIP,)."""
    return torch.randn(walks * STRIP, generator=generator)


def nearest(x: Tensor, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symbols and points, both (n,), of the walks nearest to x (n,), each STRIP long."""
    column = x[:, None].contiguous()
    symbols, points = operators().trellis_round(column, column, torch.zeros(1, 1), values, bits, STRIP)
    return symbols[:, 0], points[:, 0]


def error(x: Tensor, values: Tensor, bits: int) -> float:
    """Mean squared error of x (n,) through the trellis, relative to the mean square."""
    return ((x - nearest(x, values, bits)[1]).square().mean() / x.square().mean()).item()


def lloyd(x: Tensor, numbers: Tensor, entries: Tensor, bits: int, rounds: int) -> Tensor:
    """`entries` (n,) after some rounds of Lloyd's iteration on x, antisymmetric: entry i is minus entry n - 1 - i.

    numbers: of the entry of each state.
    """
    states = (len(numbers) - 1).bit_length()
    for _ in range(rounds):
        symbols, _ = nearest(x, entries[numbers], bits)
        chosen = numbers[walk_states(symbols.view(-1, STRIP).T, bits, states)].T.flatten()
        counts = torch.bincount(chosen, minlength=len(entries)).double()
        sums = torch.bincount(chosen, weights=x.double(), minlength=len(entries))
        counts, sums = counts + counts.flip(0), sums - sums.flip(0)
        entries = torch.where(counts > 0, sums / counts.clamp_min(1), entries.double()).float()
    return entries


def start(bits_of_entries: int, bits: int) -> Tensor:
    """Entries to start from: the quantiles of a Gaussian in ascending order."""
    count = 1 << bits_of_entries
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return (quantiles * STRETCH[bits]).float()


def covers(masks: Sequence[int]) -> bool:
    """Whether the masks are linearly independent, so that every entry is used."""
    basis: list[int] = []
    for mask in masks:
        for row in basis:
            mask = min(mask, mask ^ row)
        if mask == 0:
            return False
        basis.append(mask)
    return True


def find_masks(states: int, bits: int, effort: Effort, generator: torch.Generator) -> tuple[int, ...]:
    """The best map found for this trellis."""
    x, count = gaussian(effort.compared, generator), BITS_OF_ENTRIES[bits]

    def draw(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    def score(masks: tuple[int, ...]) -> float:
        numbers = entry_numbers(states, masks)
        return error(x, lloyd(x, numbers, start(count, bits), bits, 4)[numbers], bits)

    kept: list[tuple[float, tuple[int, ...]]] = []
    for step in tqdm(range(effort.drawn + effort.changed), desc=f"{states} states, {bits} bits"):
        if step < effort.drawn:
            masks = tuple(1 + draw((1 << states) - 1) for _ in range(count))
        else:
            changed = list(kept[draw(len(kept))][1])
            bit = 1 << draw(states) if draw(4) else 1 + draw((1 << states) - 1)
            changed[draw(count)] ^= bit
            masks = tuple(changed)
        if covers(masks) and all(masks != other for _, other in kept):
            kept = sorted([*kept, (score(masks), masks)])[: effort.kept]
    return kept[0][1]


def finish(states: int, bits: int, masks: tuple[int, ...], effort: Effort, generator: torch.Generator) -> Table:
    """Train the entries for `masks`, round them, and measure the table on numbers that it was not trained on."""
    x, numbers = gaussian(effort.trained, generator), entry_numbers(states, masks)
    real = lloyd(x, numbers, start(len(masks), bits), bits, effort.rounds)
    steps = LARGEST / real.abs().max().item()
    rounded = (real * steps).round()
    # With the highest bit folded into the others, entry i + n / 2 is minus entry i instead of entry n - 1 - i.
    folded = (*(mask ^ masks[-1] for mask in masks[:-1]), masks[-1])
    half = rounded[: len(rounded) // 2]
    entries = torch.cat([half, -half])
    values = entries[entry_numbers(states, folded)] * UNIT
    scales = [factor / (UNIT * steps) for factor in SCALES]
    scale = min(scales, key=lambda scale: error(x / scale, values, bits))
    unseen = gaussian(effort.trained, generator)
    nmse = error(unseen / scale, values, bits)
    return Table(states, bits, folded, tuple(int(entry) for entry in entries), round(scale, 6), round(nmse, 6))


def make(states: int, bits: int, seed: int, effort: Effort, masks: tuple[int, ...] | None = None) -> Table:
    """The table of one trellis; masks: instead of looking for them."""
    generator = torch.Generator().manual_seed(seed)
    if masks is None:
        masks = find_masks(states, bits, effort, generator)
    return finish(states, bits, masks, effort, torch.Generator().manual_seed(seed + 1))


def check_place(output: Path) -> None:
    """UserError, before hours of search, where `output` holds anything but tables or cannot be written."""
    refuse_inputs(output, [])
    if is_there(output):
        tables = read_json(output, "the file of tables", list, remedy="choose another --output")
        if not all(isinstance(one, dict) and {"states", "masks", "entries"} <= one.keys() for one in tables):
            raise UserError(f"{output} exists and holds no tables of this script; choose another --output.")
    try:
        try_to_write(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); choose another --output.") from error


def main(argv: list[str] | None = None) -> None:
    """Write the tables of all trellises."""
    flags = Parser(prog="python -m casp_quip_sharp.trellis.train", description=__doc__.splitlines()[0])
    flags.add_argument("--output", type=Path, default=FILE, help="the file to write (default: that of the package)")
    flags.add_argument("--seed", type=any_seed, default=0, help="of maps and Gaussian numbers (default: %(default)s)")
    flags.add_argument("--only", metavar="STATES,BITS", help="make this table alone, print it and write nothing")
    args: argparse.Namespace = flags.parse_args(argv)
    if operators() is None:
        raise UserError("tables are made with the kernels; build quiptools first (bash setup.sh).")
    if args.only is not None:
        offered = {f"{states},{bits}": (states, bits) for states, bits in MADE}
        if args.only not in offered:
            raise UserError(f"--only {args.only} names no table that is made here; use one of {' '.join(offered)}.")
        states, bits = offered[args.only]
        print(json.dumps(asdict(make(states, bits, args.seed, EFFORTS[states]))))
        return
    check_place(args.output)
    lines = [json.dumps(asdict(make(states, bits, args.seed, EFFORTS[states]))) for states, bits in MADE]
    write_atomically(args.output, ("[\n" + ",\n".join(lines) + "\n]\n").encode())


if __name__ == "__main__":
    run_main(main)
