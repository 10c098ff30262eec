"""A run folder: a stage's work on its way to becoming a checkpoint, one shard for each finished block."""

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from casp.errors import UserError, told_as
from casp.linear import stored_as
from casp.model.capture import capture_inputs
from casp.model.decoder import Decoder
from casp.model.inputs import BatchInputs
from casp.model.shards import INDEX
from casp.model.swap import describe_modules, swap_modules
from casp.ranks import ALONE
from casp.reading.compression import INSTEAD_OF_WEIGHTS, WEIGHTS_KEY
from casp.reading.documents import read_json
from casp.reading.header import read_header
from casp.run.card import inherited, model_card
from casp.run.digest import companions
from casp.run.files import write_atomically, write_json, write_shard
from casp.run.folder import WORK_PREFIX, WorkFolder
from casp.run.progress import Blocks
from casp.run.recipe import RECIPE_FILE, carried
from casp.run.report import REPORT_FILE, merge_reports
from casp.walk import Visit, walk

_WRITTEN = (
    "config.json",
    INDEX,
    REPORT_FILE,
    RECIPE_FILE,
    "README.md",
)  # what `finish` makes itself besides the shards


class RunFolder(WorkFolder):
    """The work of a stage whose outcome is a checkpoint."""

    kind = "checkpoint"

    def _shard(self, index: int) -> Path:
        total = len(self.decoder.blocks) + 1
        return self.result / f"model-{index + 1:05d}-of-{total:05d}.safetensors"

    def _block_report(self, index: int) -> Path:
        return self.folder / f"{WORK_PREFIX}block-{index:05d}.json"

    def _read_block_report(self, index: int) -> dict[str, dict[str, Any]]:
        """{"modules", "report"} of a finished block."""
        file = self._block_report(index)
        found = read_json(file, "the work on a block", remedy=self.anew)
        if not isinstance(found.get("modules"), dict) or not isinstance(found.get("report"), dict):
            raise UserError(f"{file} is not what this run wrote; {self.anew}.")
        return found

    def finished(self, index: int) -> bool:
        """Whether block `index` is on disk."""
        return self._shard(index).exists()

    def save(self, visit: Visit, report: dict[str, Any], tuned: Collection[str] = ()) -> None:
        """Write block `visit.index` as it is now; `report` is its entry in the stage's report.

        Compressed modules and the tensors named in `tuned` are written as they stand (parameters in the checkpoint's
        dtype, packed buffers as they are), everything else of the block byte for byte as in the source. Of ranks that
        visit it together the first does.
        """
        if not visit.ranks.first:
            return
        decoder, prefix = self.decoder, decoder_prefix(self.decoder, visit.index)
        source = set(decoder.shards.names(prefix))
        modules = describe_modules(visit.block)
        buffers = dict(visit.block.named_buffers())
        tensors: dict[str, Tensor] = {}
        untouched: list[str] = []
        for name, tensor in visit.block.state_dict().items():
            compressed = any(name.startswith(path + ".") for path in modules)
            if prefix + name in source and not compressed and name not in tuned:
                untouched.append(prefix + name)
            elif name in buffers:
                tensors[prefix + name] = tensor
            else:
                tensors[prefix + name] = tensor.to(decoder.dtype)
        tensors.update(decoder.shards.load(untouched))
        self.check_sources()
        write_json(self._block_report(visit.index), {"modules": modules, "report": report})
        write_shard(self._shard(visit.index), tensors)

    def _restore(self, index: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make block `index`, loaded from the source, what the finished shard says."""
        block, prefix = self.decoder.block(index), decoder_prefix(self.decoder, index)
        modules, stored = self._read_block_report(index)["modules"], self.read_shard(self._shard(index))[0]
        with told_as(f"{self._shard(index)} and its report do not fit the model", self.anew):
            swap_modules(block, {"backend": self.settings.get("backend"), "modules": missing_modules(block, modules)})
            parameters = dict(block.named_parameters())
            tensors = {}
            for name, tensor in stored.items():
                name = name.removeprefix(prefix)
                tensors[name] = tensor.to(
                    device, dtype if name in parameters and tensor.is_floating_point() else tensor.dtype
                )
            block.load_state_dict(tensors, assign=True)
        block.requires_grad_(False)

    def walk(
        self,
        batches: list[dict[str, Tensor]] | None,
        device: torch.device,
        dtype: torch.dtype,
        captured: list[BatchInputs] | None = None,
    ) -> Iterator[Visit]:
        """Visit the blocks that are not finished yet; each must be `save`d before the next is asked for.

        batches: calibration data for the blocks to see; None for a stage that looks at weights alone. captured: what
        the first block is fed with this rank's of these batches, where it is known already.

        Finished blocks are read back, also right after they were saved: what feeds the following blocks is
        always what is on disk, so an interrupted run and an uninterrupted one end with the same bytes.

        Several ranks share out the blocks where no data makes one wait for another: each visits its own, and its walk
        ends when all have done theirs. With data all visit each block together, and share out the batches.
        """
        depth, ranks = len(self.decoder.blocks), self.ranks
        left = ranks.told(lambda: [index for index in range(depth) if not self.finished(index)])
        done = depth - len(left)
        if not left:
            return
        costs = [self.decoder.block_weights(index) if index in left else 0 for index in range(depth)]
        mine = ranks.shared_out(costs) if batches is None else range(depth)
        together = ALONE if batches is None else ranks
        if done:
            print(f"resuming {self.folder}: {done} of {depth} blocks are finished")
        if batches is None:
            inputs = []
        elif captured is not None:
            inputs = [replace(batch) for batch in captured]  # the walk puts other hidden states into its own
        else:
            shared = [batches[number] for number in ranks.mine(len(batches))]
            inputs = capture_inputs(self.decoder, shared, device, dtype, ranks.first)
        progress = Blocks(self.stage, len(set(mine) & set(left)))
        for visit in walk(self.decoder, inputs, device, dtype, only=mine, ranks=together):
            if visit.index in left:
                began = time.perf_counter()
                yield visit
                ranks.did("blocks")
                together.wait()
                self.log(f"block {visit.index} finished in {time.perf_counter() - began:.1f} s")
                progress.update()
            self._restore(visit.index, device, dtype)
        progress.close()
        ranks.wait()

    def load_finished(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load all blocks as the finished shards hold them, compressed, all at once."""
        for index in range(len(self.decoder.blocks)):
            self._restore(index, device, dtype)

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors`, by the model's names, in the place of those that the finished blocks hold.

        Each is stored in the dtype that it has there. Doing it twice changes nothing more.
        """
        for index in range(len(self.decoder.blocks)):
            prefix = decoder_prefix(self.decoder, index)
            stored, _ = self.read_shard(self._shard(index))
            new = {name: stored_as(tensors[name], stored[name].dtype) for name in stored if name in tensors}
            if any(not torch.equal(new[name].cpu(), stored[name]) for name in new):
                write_shard(self._shard(index), {**stored, **new})
            lost = [name for name in tensors if name.startswith(prefix) and name not in stored]
            if lost:
                raise ValueError(f"{lost[0]} is not stored in block {index}")

    def finish(
        self,
        rest_changes: Mapping[str, Tensor] | None = None,
        details: Mapping[str, Any] | None = None,
        step: Mapping[str, Any] | None = None,
    ) -> Path:
        """Complete the checkpoint (rest of the weights, config, tokenizer, card) and rename it to `output`.

        rest_changes: tensors outside the blocks, by the model's names, that the stage has changed; details: more
        entries of the stage's report; step: of the recipe that the checkpoint carries (`casp.run.recipe`). Of several
        ranks the first does it.
        """
        return self.close(self.ranks.told(lambda: self._complete(rest_changes, details, step)))

    def _complete(
        self,
        rest_changes: Mapping[str, Tensor] | None,
        details: Mapping[str, Any] | None,
        step: Mapping[str, Any] | None,
    ) -> list[str]:
        """All files of the checkpoint that no block has; the names of all."""
        decoder, depth = self.decoder, len(self.decoder.blocks)
        modules: dict[str, dict[str, Any]] = {}
        blocks = []
        for index in range(depth):
            record = self._read_block_report(index)
            modules |= {decoder_prefix(decoder, index) + path: entry for path, entry in record["modules"].items()}
            blocks.append({"index": index, **record["report"]})
        changed = {name: tensor.to(decoder.dtype) for name, tensor in (rest_changes or {}).items()}
        kept = [name for name in decoder.rest_names() if name not in changed]
        rest = {stored for name in kept for stored in decoder.shards.stored_names(name)}
        tensors = {stored: decoder.shards.read_stored(stored) for stored in sorted(rest)}
        write_shard(self._shard(depth), {**tensors, **changed})
        self._write_index(depth + 1)
        copied = [file for file in companions(decoder.folder) if file.name not in _WRITTEN]
        for file in copied:
            write_atomically(self.result / file.name, file.read_bytes())
        config = read_json(decoder.folder / "config.json", "the config")
        config[WEIGHTS_KEY] = INSTEAD_OF_WEIGHTS
        config["quantization_config"] = {
            "quant_method": "casp",
            "version": 2 if decoder.splits else 1,
            "backend": self.settings.get("backend"),
            "original_weights": decoder.original_weights(),
            "modules": modules,
            **({"splits": decoder.splits} if decoder.splits else {}),
        }
        report = merge_reports(
            decoder.folder,
            {"stage": self.stage, "base_model": self.base_model, "settings": self.settings, "blocks": blocks}
            | dict(details or {}),
        )
        write_json(self.result / REPORT_FILE, report)
        stored = sum(file.stat().st_size for file in self.result.glob("*.safetensors"))
        card = model_card(
            report, config["quantization_config"], stored, decoder.is_multimodal, inherited(decoder.folder)
        )
        write_atomically(self.result / "README.md", card.encode())
        if step is not None:
            write_json(self.result / RECIPE_FILE, carried(decoder.folder, step))
        write_json(self.result / "config.json", config)
        shards = [self._shard(index).name for index in range(depth + 1)]
        return [*_WRITTEN, *shards, *(file.name for file in copied)]

    def _write_index(self, shards: int) -> None:
        weight_map, total = {}, 0
        for index in range(shards):
            shard = self._shard(index)
            with self.reading(shard):
                stored = read_header(shard)
            weight_map |= dict.fromkeys(stored, shard.name)
            total += sum(entry.bytes for entry in stored.values())
        write_json(
            self.result / INDEX,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )


def decoder_prefix(decoder: Decoder, index: int) -> str:
    """What the names of block `index` begin with."""
    return decoder.blocks[index] + "."


def missing_modules(block: torch.nn.Module, modules: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of `modules` that `block` does not hold yet."""
    present = describe_modules(block)
    return {path: entry for path, entry in modules.items() if present.get(path) != entry}
