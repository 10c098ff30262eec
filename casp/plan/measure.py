"""Pricing all linears of a decoder, block by block, into a work folder: once for every budget and allocation."""

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from casp.errors import UserError
from casp.model.decoder import Decoder
from casp.moments.store import Moments
from casp.plan.costs import Pricing, price
from casp.plan.options import LinearOptions, Option
from casp.reading.documents import read_json
from casp.run.files import write_json
from casp.run.folder import WorkFolder
from casp.run.progress import counted

STAGE = "costs"


class CostsFolder(WorkFolder):
    """The work of pricing options."""

    kind = "costs"


def costs_file(index: int) -> str:
    """Name of the file with the options of block `index`."""
    return f"block-{index:05d}.json"


def measure(
    decoder: Decoder, work: CostsFolder, moments: Moments, pricing: Pricing, device: torch.device, dtype: torch.dtype
) -> Path:
    """Price the options of all linears into `work`; blocks of an earlier attempt are taken as they are.

    Several ranks share out the blocks. Memory: one block's weights, and of one linear at a time its moments and a few
    copies in float64.
    """
    depth, ranks = len(decoder.blocks), work.ranks
    missing = ranks.told(lambda: [index for index in range(depth) if not (work.result / costs_file(index)).exists()])
    if 0 < len(missing) < depth:
        print(f"resuming {work.folder}: {depth - len(missing)} of {depth} blocks are priced")
    mine = [missing[place] for place in ranks.shared_out([decoder.block_weights(index) for index in missing])]
    for index in counted(mine, STAGE):
        began = time.perf_counter()
        block, known = decoder.load_block(index, device, dtype), moments.read(index)
        entries: list[dict[str, Any]] = []
        for role, path in decoder.linears(index).items():
            linear, full_path = block.get_submodule(path), f"{decoder.blocks[index]}.{path}"
            options = price(pricing, linear.weight.detach(), known[path], role, full_path)
            entries.append(
                {
                    "path": full_path,
                    "role": role,
                    "shape": [linear.out_features, linear.in_features],
                    "influence": known.influence,
                    "options": [[option.rank, option.formats, option.bytes, option.cost] for option in options],
                }
            )
        work.check_sources()
        write_json(work.result / costs_file(index), entries)
        decoder.unload_block(index)
        work.log(f"block {index} priced in {time.perf_counter() - began:.1f} s")
    return work.close([costs_file(index) for index in range(depth)])


def read_costs(folder: Path, blocks: int) -> list[LinearOptions]:
    """The linears with their priced options from a finished folder of `measure`; UserError where it is damaged."""
    found = []
    for index in range(blocks):
        file = folder / costs_file(index)
        try:
            for entry in read_json(file, "the priced options", list):
                options = [Option(rank, tuple(formats), size, cost) for rank, formats, size, cost in entry["options"]]
                found.append(
                    LinearOptions(
                        entry["path"], index, entry["role"], *entry["shape"], entry["influence"], tuple(options)
                    )
                )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged; price the options again with plan.sh and another --costs.") from error
    return found


def with_low_rank(linears: Sequence[LinearOptions], roles: Collection[str]) -> list[LinearOptions]:
    """The same linears, low rank only for those of `roles`."""
    return [
        linear
        if linear.role in roles
        else replace(linear, options=tuple(option for option in linear.options if option.rank is None))
        for linear in linears
    ]
