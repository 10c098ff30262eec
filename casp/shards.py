"""Reading a checkpoint's safetensors one tensor at a time, under the names that the model uses.

Checkpoints on the hub often carry the names of an older release of transformers; the library renames
(and for a few models regroups) tensors while it loads. The same mapping is applied here, tensor by tensor.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from casp.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """Where one stored tensor lies: its shard, dtype (safetensors' name), shape and size in bytes."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def _header(shard: Path) -> dict[str, dict]:
    """The JSON header of a safetensors file, after checking that the file is as long as it says."""
    remedy = "download or write it again"
    try:
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= shard.stat().st_size:
                raise UserError(f"{shard} is truncated or not a safetensors file; {remedy}.")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise UserError(f"{shard} is missing although the checkpoint's index names it; {remedy}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{shard} has a damaged header; {remedy}.") from error
    header.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if shard.stat().st_size < 8 + length + end:
        raise UserError(f"{shard} is truncated ({shard.stat().st_size} of {8 + length + end} bytes); {remedy}.")
    return header


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor stored in a checkpoint folder, by its stored name."""
    index = folder / INDEX
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is not a safetensors index; download or write it again.") from error
    elif (folder / SINGLE).exists():
        shards = [SINGLE]
    else:
        raise UserError(
            f"{folder} holds no {SINGLE} and no {INDEX}; convert the checkpoint to safetensors "
            "(save_pretrained of transformers does) or correct --model."
        )
    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, tensor in _header(folder / shard).items():
            begin, end = tensor["data_offsets"]
            entries[name] = Entry(folder / shard, tensor["dtype"], tuple(tensor["shape"]), end - begin)
    return entries


@dataclass
class _Source:
    """How one or several tensors of the model come out of stored tensors."""

    stored: list[tuple[str, str | None]] = field(default_factory=list)
    converter: WeightConverter | None = None


class Shards:
    """The stored tensors of a checkpoint, addressed by the names of `model` (which may be on meta)."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.folder = folder
        self.entries = read_entries(folder)
        self._model = model
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        names = model.state_dict()
        self._sources: dict[str, _Source] = {}
        for stored in sorted(self.entries):
            args = (model.base_model_prefix, names)
            name, pattern = rename_source_key(stored, renamings, converters, *args)
            if name not in names:
                plain, _ = rename_source_key(stored, [], [], *args)
                if plain in names:
                    name, pattern = plain, None
            source = self._sources.setdefault(name, _Source())
            source.stored.append((stored, pattern))
            if pattern is not None and source.converter is None:
                source.converter = copy.deepcopy(by_pattern[pattern])

    def names(self, prefix: str) -> list[str]:
        """The model's names, under `prefix`, of what is stored."""
        return [name for name in self._sources if name.startswith(prefix)]

    def converted(self, prefix: str) -> list[str]:
        """The names under `prefix` whose tensors are regrouped while they are read (fused experts, say)."""
        return [name for name in self.names(prefix) if self._sources[name].converter is not None]

    def stored_names(self, name: str) -> list[str]:
        """The stored tensors that make up the model's tensor `name`."""
        return [stored for stored, _ in self._sources[name].stored]

    def _read(self, stored: str) -> Tensor:
        entry = self.entries[stored]
        try:
            with safe_open(entry.shard, framework="pt") as file:
                tensor = file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{entry.shard} is damaged ({error}); download or write it again.") from error
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"{stored} in {entry.shard.name} holds NaN or infinite values; the checkpoint is damaged: "
                "download or train it again."
            )
        return tensor

    def load(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read the named tensors of the model from disk, one at a time."""
        for name in names:
            source = self._sources[name]
            if source.converter is None:
                yield name, self._read(source.stored[0][0])
                continue
            converter = copy.deepcopy(source.converter)
            for stored, pattern in source.stored:
                converter.add_tensor(name, stored, pattern, self._read(stored))
            made = converter.convert(name, model=self._model, config=self._model.config)
            for target, tensor in made.items():
                yield target, tensor[0] if isinstance(tensor, list) else tensor

    def read_stored(self, stored: str) -> Tensor:
        """One tensor as it is on disk, under its stored name."""
        return self._read(stored)
