"""Pricing all linears of a decoder, block by block, into a work folder: once for every budget and allocation."""

import json
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from casp.backend import Backend
from casp.errors import UserError
from casp.model.decoder import Decoder
from casp.moments.store import Moments
from casp.plan.costs import Pricing, price
from casp.plan.file import refused_format, shapes
from casp.plan.options import LinearOptions, Option, option_bytes, stored_shapes
from casp.reading.documents import read_json
from casp.run.files import write_json
from casp.run.folder import WorkFolder
from casp.run.progress import counted

STAGE = "costs"
_Checked = tuple[str, tuple[int, int]]  # an option or a format as JSON, and the shape that it is of


class CostsFolder(WorkFolder):
    """The work of pricing options."""

    kind, flag = "costs", "--costs"


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
        ranks.did("blocks")
        work.log(f"block {index} priced in {time.perf_counter() - began:.1f} s")
    return work.close([costs_file(index) for index in range(depth)])


def read_costs(folder: Path, decoder: Decoder, backend: Backend) -> list[LinearOptions]:
    """The linears of `decoder` with their priced options from a finished folder of `measure` for `backend`.

    UserError where it is not what `measure` wrote: other linears, ranks, formats or bytes, costs that are no numbers.
    """
    found, wanted = [], shapes(decoder)
    checked: set[_Checked] = set()
    for index, block in enumerate(decoder.blocks):
        file = folder / costs_file(index)
        roles = {f"{block}.{path}": role for role, path in decoder.linears(index).items()}
        try:
            listed = read_json(file, "the priced options", list)
            entries = {entry["path"]: entry for entry in listed}
            if entries.keys() != roles.keys() or len(entries) != len(listed):
                raise ValueError(f"options of {len(listed)} linears for a block of {len(roles)}")
            for path, role in roles.items():
                entry, shape = entries[path], wanted[path]
                if [entry["role"], *entry["shape"]] != [role, *shape]:
                    raise ValueError(f"{path} is another linear")
                options = tuple(_option(one, shape, backend, checked) for one in entry["options"])
                if all(option.rank is not None for option in options):
                    raise ValueError(f"{path} has no option of full rank")
                found.append(LinearOptions(path, index, role, *shape, _number(entry["influence"]), options))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged; price the options again with plan.sh and another --costs.") from error
    return found


def _option(entry: list[Any], shape: tuple[int, int], backend: Backend, checked: set[_Checked]) -> Option:
    """An option as it was written; what is right of a shape is added to `checked` and looked at once. ValueError."""
    rank, formats, size, cost = entry
    key = (json.dumps(entry[:3]), shape)
    if key not in checked:
        if rank is not None and not (type(rank) is int and 1 <= rank <= min(shape)):
            raise ValueError(f"rank {rank!r} of a matrix of {shape}")
        for format, stored in zip(formats, stored_shapes(rank, *shape), strict=True):
            _check_format(format, stored, backend, checked)
        if type(size) is not int or size != option_bytes(backend, rank, formats, *shape):
            raise ValueError(f"{size!r} bytes")
        checked.add(key)
    return Option(rank, tuple(formats), size, _number(cost))


def _check_format(format: Any, shape: tuple[int, int], backend: Backend, checked: set[_Checked]) -> None:
    key = (json.dumps(format), shape)
    if key not in checked and (reason := refused_format(format, shape, backend)):
        raise ValueError(reason)
    checked.add(key)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return value


def with_low_rank(linears: Sequence[LinearOptions], roles: Collection[str]) -> list[LinearOptions]:
    """The same linears, low rank only for those of `roles`."""
    return [
        linear
        if linear.role in roles
        else replace(linear, options=tuple(option for option in linear.options if option.rank is None))
        for linear in linears
    ]
