"""A run folder: what a stage has finished stays finished, whatever ends the process.

A stage works in `OUTPUT.partial`: every finished block is one shard of the coming checkpoint, written to a
temporary name, synced and renamed. A rerun with the same model, calibration and settings takes the finished
blocks from there; the folder becomes `OUTPUT` by one rename when everything is in it. So `OUTPUT` is either
complete or absent.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from casp.card import model_card
from casp.errors import UserError
from casp.models import Decoder
from casp.shards import INDEX, content_hash
from casp.swap import describe_modules, swap_modules
from casp.walk import Visit, capture_inputs, walk

RUN_FILE, REPORT_FILE, LOG_FILE = "casp_run.json", "casp_report.json", "casp_run.log"
COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path` such that `path` holds either what it held before or all of `data`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """`tensors` as one safetensors file, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, {"format": "pt"})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What two fingerprints differ in, in words."""
    flat_old, flat_new = ({**f, **f.get("settings", {})} for f in (old, new))
    keys = [
        k for k in sorted(flat_old.keys() | flat_new.keys()) if k != "settings" and flat_old.get(k) != flat_new.get(k)
    ]
    shown = [k if k in ("model", "calibration") else f"{k} {flat_old.get(k)} -> {flat_new.get(k)}" for k in keys]
    return ", ".join(shown)


class RunFolder:
    """The work of one stage on one model, on its way to becoming a checkpoint folder.

    settings: everything that decides the outcome, JSON-able, for the record and the fingerprint;
    calibration: fingerprint of the calibration batches ("" when the stage uses none).
    """

    def __init__(
        self,
        output: Path,
        decoder: Decoder,
        stage: str,
        base_model: str,
        settings: dict[str, Any],
        calibration: str,
    ) -> None:
        self.output, self.decoder, self.stage = Path(output), decoder, stage
        self.base_model, self.settings = base_model, settings
        self.folder = self.output.with_name(self.output.name + ".partial")
        self.fingerprint = {
            "stage": stage,
            "model": content_hash(decoder.folder),
            "calibration": calibration,
            "settings": settings,
        }
        self.done = self._check_output()
        if not self.done:
            self._open_partial()

    def _check_output(self) -> bool:
        if not self.output.exists():
            return False
        if not self.output.is_dir():
            raise UserError(f"{self.output} exists and is not a folder; choose another --output.")
        if not any(self.output.iterdir()):
            return False
        try:
            finished = json.loads((self.output / RUN_FILE).read_text())["fingerprint"]
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{self.output} holds other files; choose another --output.") from error
        if finished != self.fingerprint:
            raise UserError(
                f"{self.output} is the result of another run (differs in: {_difference(finished, self.fingerprint)}); "
                "choose another --output or remove that folder."
            )
        return True

    def _open_partial(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process is writing {self.folder}; wait for it or choose another --output."
            ) from error
        record = self.folder / RUN_FILE
        if record.exists():
            old = json.loads(record.read_text())["fingerprint"]
            if old != self.fingerprint:
                raise UserError(
                    f"{self.folder} was begun by another run (differs in: {_difference(old, self.fingerprint)}); "
                    "remove that folder or choose another --output."
                )
        else:
            write_json(record, {"base_model": self.base_model, "fingerprint": self.fingerprint})

    def _shard(self, index: int) -> Path:
        total = len(self.decoder.blocks) + 1
        return self.folder / f"model-{index + 1:05d}-of-{total:05d}.safetensors"

    def _block_report(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def finished(self, index: int) -> bool:
        """Whether block `index` is on disk."""
        return self._shard(index).exists()

    def log(self, line: str) -> None:
        """Append a line with the time of day to the run's log."""
        with (self.folder / LOG_FILE).open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def save(self, visit: Visit, report: dict[str, Any]) -> None:
        """Write block `visit.index` as it is now; `report` is its entry in the stage's report.

        Compressed modules are written as they stand (parameters in the checkpoint's dtype, packed buffers
        as they are), everything else of the block byte for byte as in the source.
        """
        decoder, prefix = self.decoder, decoder_prefix(self.decoder, visit.index)
        source = set(decoder.shards.names(prefix))
        modules = describe_modules(visit.block)
        buffers = dict(visit.block.named_buffers())
        tensors: dict[str, Tensor] = {}
        untouched: list[str] = []
        for name, tensor in visit.block.state_dict().items():
            if prefix + name in source and not any(name.startswith(path + ".") for path in modules):
                untouched.append(prefix + name)
            elif name in buffers:
                tensors[prefix + name] = tensor
            else:
                tensors[prefix + name] = tensor.to(decoder.dtype)
        tensors.update(decoder.shards.load(untouched))
        write_json(self._block_report(visit.index), {"modules": modules, "report": report})
        write_shard(self._shard(visit.index), tensors)

    def _restore(self, index: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make block `index`, loaded from the source, what the finished shard says."""
        block, prefix = self.decoder.block(index), decoder_prefix(self.decoder, index)
        modules = json.loads(self._block_report(index).read_text())["modules"]
        swap_modules(block, {"backend": self.settings.get("backend"), "modules": missing_modules(block, modules)})
        parameters = dict(block.named_parameters())
        tensors = {}
        for name, tensor in load_file(self._shard(index)).items():
            name = name.removeprefix(prefix)
            tensors[name] = tensor.to(
                device, dtype if name in parameters and tensor.is_floating_point() else tensor.dtype
            )
        block.load_state_dict(tensors, assign=True)
        block.requires_grad_(False)

    def walk(
        self, batches: list[dict[str, Tensor]], device: torch.device, dtype: torch.dtype, advance: bool = True
    ) -> Iterator[Visit]:
        """Visit the blocks that are not finished yet; each must be `save`d before the next is asked for.

        Finished blocks are read back, also right after they were saved: what feeds the following blocks is
        always what is on disk, so an interrupted run and an uninterrupted one end with the same bytes.
        """
        depth = len(self.decoder.blocks)
        done = sum(self.finished(index) for index in range(depth))
        if done == depth:
            return
        if done:
            print(f"resuming {self.folder}: {done} of {depth} blocks are finished")
        inputs = capture_inputs(self.decoder, batches, device, dtype)
        progress = tqdm(total=depth - done, desc=self.stage, unit="block", dynamic_ncols=True)
        for visit in walk(self.decoder, inputs, device, dtype, lambda index: advance):
            if not self.finished(visit.index):
                began = time.perf_counter()
                yield visit
                self.log(f"block {visit.index} finished in {time.perf_counter() - began:.1f} s")
                progress.update()
            self._restore(visit.index, device, dtype)
        progress.close()

    def finish(self) -> Path:
        """Complete the checkpoint (rest of the weights, config, tokenizer, card) and rename it to `output`."""
        decoder, depth = self.decoder, len(self.decoder.blocks)
        modules: dict[str, dict[str, Any]] = {}
        blocks = []
        for index in range(depth):
            record = json.loads(self._block_report(index).read_text())
            modules |= {decoder_prefix(decoder, index) + path: entry for path, entry in record["modules"].items()}
            blocks.append({"index": index, **record["report"]})
        rest = [stored for name in decoder.rest_names() for stored in decoder.shards.stored_names(name)]
        write_shard(self._shard(depth), {stored: decoder.shards.read_stored(stored) for stored in sorted(set(rest))})
        self._write_index(depth + 1)
        for file in sorted(decoder.folder.iterdir()):
            if file.suffix in COPIED and file.name not in ("config.json", INDEX, RUN_FILE, REPORT_FILE):
                write_atomically(self.folder / file.name, file.read_bytes())
        config = json.loads((decoder.folder / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "casp",
            "version": 1,
            "backend": self.settings.get("backend"),
            "original_weights": decoder.original_weights(),
            "modules": modules,
        }
        report = merge_reports(
            decoder.folder,
            {"stage": self.stage, "base_model": self.base_model, "settings": self.settings, "blocks": blocks},
        )
        write_json(self.folder / REPORT_FILE, report)
        stored = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        write_atomically(self.folder / "README.md", model_card(report, config["quantization_config"], stored).encode())
        write_json(self.folder / "config.json", config)
        for leftover in [*self.folder.glob("block-*.json"), *self.folder.glob("*.tmp"), self.folder / "lock"]:
            leftover.unlink()
        if self.output.exists():
            self.output.rmdir()
        os.replace(self.folder, self.output)
        _sync(self.output.parent)
        self.done = True
        return self.output

    def _write_index(self, shards: int) -> None:
        weight_map, total = {}, 0
        for index in range(shards):
            shard = self._shard(index)
            with shard.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for name, entry in header.items():
                if name != "__metadata__":
                    weight_map[name] = shard.name
                    total += entry["data_offsets"][1] - entry["data_offsets"][0]
        write_json(
            self.folder / INDEX,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )


def decoder_prefix(decoder: Decoder, index: int) -> str:
    """What the names of block `index` begin with."""
    return decoder.blocks[index] + "."


def missing_modules(block: torch.nn.Module, modules: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of `modules` that `block` does not hold yet."""
    present = describe_modules(block)
    return {path: entry for path, entry in modules.items() if present.get(path) != entry}


def merge_reports(source: Path, report: dict[str, Any]) -> dict[str, Any]:
    """`report` with what an earlier stage's report in folder `source` says of each block filled in."""
    earlier_file = source / REPORT_FILE
    if not earlier_file.exists():
        return {"stages": [_stage_entry(report)], **report}
    earlier = json.loads(earlier_file.read_text())
    blocks = []
    for old, new in zip(earlier["blocks"], report["blocks"], strict=True):
        linears = dict(old.get("linears", {}))
        for role, values in new.get("linears", {}).items():
            linears[role] = {**linears.get(role, {}), **values}
        blocks.append({**old, **new, "linears": linears})
    return {"stages": [*earlier["stages"], _stage_entry(report)], **report, "blocks": blocks}


def _stage_entry(report: dict[str, Any]) -> dict[str, Any]:
    return {"stage": report["stage"], "settings": report["settings"]}
