"""Reading a checkpoint's safetensors one tensor at a time, under the names that the model uses.

Checkpoints on the hub often carry the names of an older release of transformers; the library renames
(and for a few models regroups) tensors while it loads. The same mapping is applied here, tensor by tensor.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from casp.errors import UserError
from casp.linear import QuantizedLinear
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


class Shards:
    """The stored tensors of a checkpoint, addressed by the names of `model` (which may be on meta)."""

    def __init__(self, entries: Mapping[str, Entry], model: PreTrainedModel) -> None:
        self.entries = entries
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
            if name not in whole:
                if blocks is not None and name.startswith(blocks + "."):
                    self._refuse_block(folder, blocks, name)
                continue
            if source.converter is not None:
                continue
            if entry.shape != tuple(whole[name].shape):
                raise UserError(
                    f"{stored} in {folder} has shape {entry.shape} where the config asks for "
                    f"{tuple(whole[name].shape)}; config.json and the weights do not belong together."
                )
            if name in packed and DTYPES[entry.dtype] != whole[name].dtype:
                raise UserError(
                    f"{stored} in {folder} is stored as {entry.dtype}, its format has {whole[name].dtype}; make or "
                    "download the checkpoint again."
                )
            if name in parameters and entry.dtype not in WEIGHTS:
                raise UserError(
                    f"{stored} in {folder} is stored as {entry.dtype}, which no weight is here; give the checkpoint in "
                    "bfloat16, float16 or float32."
                )
        tied = self._model.all_tied_weights_keys
        missing = [
            name
            for name, tensor in whole.items()
            if tensor.is_meta and name not in self._sources and not self._is_tied(name, tied)
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
