"""A folder that a stage fills: what is finished stays finished, whatever ends the process.

A stage works in `OUTPUT.partial`: every finished block is a file, written to a temporary name, synced and renamed.
A rerun with the same model, calibration and settings takes the finished blocks from there; the folder becomes
`OUTPUT` by one rename when everything is in it. So `OUTPUT` is either complete or absent.
"""

import fcntl
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from casp.errors import UserError
from casp.models import Decoder
from casp.shards import content_hash

RUN_FILE, LOG_FILE = "casp_run.json", "casp_run.log"
WORK_PREFIX = "work-"  # of files that only the work needs; the finished folder has none


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
    sync(path.parent)


def sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """`tensors` as one safetensors file with `metadata` in its header, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(stored, temporary, metadata or {"format": "pt"})  # the order of several keys would be random
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What two fingerprints differ in, in words."""
    flat_old, flat_new = ({**f, **f.get("settings", {})} for f in (old, new))
    keys = [
        k for k in sorted(flat_old.keys() | flat_new.keys()) if k != "settings" and flat_old.get(k) != flat_new.get(k)
    ]
    shown = [k if k in ("model", "calibration") else f"{k} {flat_old.get(k)} -> {flat_new.get(k)}" for k in keys]
    return ", ".join(shown)


class WorkFolder:
    """The work of one stage on one model, from its first block to the finished folder.

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
        self.began = time.perf_counter()
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

    def log(self, line: str) -> None:
        """Append a line with the time of day to the run's log."""
        with (self.folder / LOG_FILE).open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def account(self) -> str:
        """What this attempt took so far: "in 90 s, at most 1.86 GB of memory", the GPU's besides where one was used."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        words = f"in {time.perf_counter() - self.began:.0f} s, at most {peak / 1e9:.2f} GB of memory"
        if torch.cuda.is_initialized():
            words += f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU"
        return words

    def close(self) -> Path:
        """Rename the finished work to `output`; what only the work needed is removed."""
        self.log(f"finished {self.account()}")
        for leftover in [*self.folder.glob(f"{WORK_PREFIX}*"), *self.folder.glob("*.tmp"), self.folder / "lock"]:
            leftover.unlink()
        if self.output.exists():
            self.output.rmdir()
        os.replace(self.folder, self.output)
        sync(self.output.parent)
        self.done = True
        return self.output
