"""Reading a checkpoint's safetensors one tensor at a time, under the names that the model uses.

Checkpoints on the hub often carry the names of an older release of transformers; the library renames
(and for a few models regroups) tensors while it loads. The same mapping is applied here, tensor by tensor.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from casp.errors import UserError
from casp.linear import QuantizedLinear
from casp.model.split import Fused
from casp.reading.documents import read_json
from casp.reading.files import is_there
from casp.reading.header import DTYPES, WEIGHTS, Entry, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_INDEX_BYTES = 32 << 20


def shard_names(folder: Path) -> list[str]:
    """Names of a checkpoint's shards, all in its own folder; a single file goes before an index, as in transformers."""
    if is_there(folder / SINGLE):
        return [SINGLE]
    index = folder / INDEX
    if not is_there(index):
        raise UserError(
            f"{folder} holds no {SINGLE} and no {INDEX}; convert the checkpoint to safetensors "
            "(save_pretrained of transformers does) or correct --model."
        )
    weight_map = read_json(index, "the index", most=MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index} is not a safetensors index; download or write it again.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{index} names {name[:100]!r}, which is no .safetensors file of that folder; download it again."
            )
    return names


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor stored in a checkpoint folder, by its stored name."""
    entries: dict[str, Entry] = {}
    for name in shard_names(folder):
        if not is_there(folder / name):
            raise UserError(
                f"{folder / name} is missing although the checkpoint's index names it; download or write it again."
            )
        entries |= read_header(folder / name)
    return entries


@dataclass
class _Source:
    """How one or several tensors of the model come out of stored tensors."""

    stored: list[tuple[str, str | None]] = field(default_factory=list)
    converter: WeightConverter | None = None


class _BeforeSplits:
    """A model as converters ask for it, with the fused tensors that it had before it was taken apart."""

    def __init__(self, model: PreTrainedModel, fused: Mapping[str, Fused]) -> None:
        self._model, self._fused = model, fused

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        """The model's tensor `name`, on meta where it is fused."""
        if name in self._fused:
            return torch.empty(self._fused[name].shape, device="meta")
        return self._model.get_parameter(name)


def _other_targets(converter: WeightConverter, name: str) -> list[str]:
    """What a converter makes besides the tensor `name`, which is its first."""
    first, *others = (pattern.replace("\\", "").strip("^$") for pattern in converter.target_patterns)
    return [name.replace(first, other) for other in others if first in name]


class Shards:
    """The stored tensors of a checkpoint, addressed by the names of `model` (which may be on meta).

    fused: of a model that was taken apart (`casp.model.split`) the tensors that are stored whole.
    """

    def __init__(
        self, entries: Mapping[str, Entry], model: PreTrainedModel, fused: Mapping[str, Fused] | None = None
    ) -> None:
        self.entries = entries
        self._model = model
        self._fused = dict(fused or {})
        self._whole_of = {part: name for name, whole in self._fused.items() for part in whole.parts}
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        own = {name: tensor for name, tensor in model.state_dict().items() if name not in self._whole_of}
        names = {**own, **self._fused}  # as the model had them before it was taken apart
        self._sources: dict[str, _Source] = {}
        self._made_with: dict[str, str] = {}  # where a converter makes several tensors: those beside the first -> it
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
                self._made_with |= {other: name for other in _other_targets(source.converter, name)}

    def names(self, prefix: str) -> list[str]:
        """The model's names, under `prefix`, of what is stored; the parts of what is stored whole."""
        expanded = (part for name in (*self._sources, *self._made_with) for part in self._parts(name))
        return [name for name in expanded if name.startswith(prefix)]

    def _parts(self, name: str) -> Iterable[str]:
        return self._fused[name].parts if name in self._fused else (name,)

    def _source_of(self, name: str) -> str:
        """The name under which the source of the model's tensor `name` is kept."""
        whole = self._whole_of.get(name, name)
        return self._made_with.get(whole, whole)

    def stored_names(self, name: str) -> list[str]:
        """The stored tensors that make up the model's tensor `name`."""
        return [stored for stored, _ in self._sources[self._source_of(name)].stored]

    def check(self, folder: Path, blocks: str | None = None, within: tuple[str, ...] = ("",)) -> None:
        """UserError unless the stored tensors are those that the model is made of, in type and shape; reads no data.

        blocks: path of the list of decoder blocks, of which nothing may be stored that the model does not have; within:
        what the names that are checked begin with.
        """
        whole = {name: tensor for name, tensor in self._model.state_dict().items() if name.startswith(within)}
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        packed = {
            f"{path}.{name}"
            for path, module in self._model.named_modules()
            if isinstance(module, QuantizedLinear)
            for name, _ in module.named_buffers(recurse=False)
        }
        for name, source in self._sources.items():
            stored = source.stored[0][0]
            entry = self.entries[stored]
            shape = self._fused[name].shape if name in self._fused else None
            if shape is None and name not in whole:
                if blocks is not None and name.startswith(blocks + "."):
                    self._refuse_block(folder, blocks, name)
                continue
            if source.converter is not None:
                continue
            shape = tuple(whole[name].shape) if shape is None else shape
            if entry.shape != shape:
                raise UserError(
                    f"{stored} in {folder} has shape {entry.shape} where the config asks for "
                    f"{shape}; config.json and the weights do not belong together."
                )
            if name in packed and DTYPES[entry.dtype] != whole[name].dtype:
                raise UserError(
                    f"{stored} in {folder} is stored as {entry.dtype}, its format has {whole[name].dtype}; make or "
                    "download the checkpoint again."
                )
            if (name in parameters or name in self._fused) and entry.dtype not in WEIGHTS:
                raise UserError(
                    f"{stored} in {folder} is stored as {entry.dtype}, which no weight is here; give the checkpoint in "
                    "bfloat16, float16 or float32."
                )
        tied = self._model.all_tied_weights_keys
        missing = [
            name
            for name, tensor in whole.items()
            if tensor.is_meta and self._source_of(name) not in self._sources and not self._is_tied(name, tied)
        ]
        if missing:
            raise UserError(
                f"{folder} lacks {missing[0]}"
                + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
                + " that its config asks for; download or write the checkpoint again."
            )

    def _is_tied(self, name: str, tied: Mapping[str, str]) -> bool:
        return tied.get(name) in self._sources or any(tied[other] == name for other in tied if other in self._sources)

    def _refuse_block(self, folder: Path, blocks: str, name: str) -> None:
        """UserError where `name` is of a block beyond the config's; what transformers passes over is let be."""
        number = name.removeprefix(blocks + ".").partition(".")[0]
        depth = self._model.config.get_text_config().num_hidden_layers
        patterns = self._model._keys_to_ignore_on_load_unexpected or ()
        beyond = number.isdecimal() and int(number) >= depth
        if beyond and not any(re.search(pattern, name) for pattern in patterns):
            raise UserError(
                f"{folder} stores block {number}, its config asks for {depth} blocks; config.json and the weights do "
                "not belong together."
            )

    def _read(self, stored: str) -> Tensor:
        entry = self.entries[stored]
        try:
            with safe_open(entry.shard, framework="pt") as file:
                tensor = file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{entry.shard} is damaged ({error}); download or write it again.") from error
        if entry.dtype in WEIGHTS and not torch.isfinite(tensor).all():
            raise UserError(
                f"{stored} in {entry.shard.name} holds NaN or infinite values; the checkpoint is damaged: "
                "download or train it again."
            )
        return tensor

    def load(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read the named tensors of the model from disk, one at a time; what is stored whole is read once."""
        wanted: dict[str, set[str]] = {}
        for name in names:
            wanted.setdefault(self._source_of(name), set()).add(name)
        for source, targets in wanted.items():
            for name, tensor in self._load(source):
                parts = self._fused[name].parts if name in self._fused else {name: lambda whole: whole}
                yield from ((part, take(tensor)) for part, take in parts.items() if part in targets)

    def _load(self, name: str) -> Iterator[tuple[str, Tensor]]:
        source = self._sources[name]
        if source.converter is None:
            yield name, self._read(source.stored[0][0])
            return
        converter = copy.deepcopy(source.converter)
        for stored, pattern in source.stored:
            converter.add_tensor(name, stored, pattern, self._read(stored))
        made = converter.convert(name, model=_BeforeSplits(self._model, self._fused), config=self._model.config)
        for target, tensor in made.items():
            yield target, tensor[0] if isinstance(tensor, list) else tensor

    def read_stored(self, stored: str) -> Tensor:
        """One tensor as it is on disk, under its stored name."""
        return self._read(stored)
