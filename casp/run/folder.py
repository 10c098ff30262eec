"""A folder that a stage fills: what is finished stays finished, whatever ends the process.

A run lives in `OUTPUT.partial`: its record (`casp_run.json`), a lock, its log, files that only the work needs
(`work-*`), and `result`, the folder in the making. Finishing is a commit: `result` is completed, then renamed to
`OUTPUT`; only after that is anything removed, and whatever ends the process in between, the rest is removed by the
next run. So `OUTPUT` is either complete or absent, and a rerun with the same model, calibration and settings
continues from any moment to the same bytes.
"""

import os
import resource
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from casp.errors import UserError, in_brief
from casp.model.decoder import Decoder
from casp.ranks import ALONE, Ranks
from casp.reading.header import read_header_with_metadata
from casp.run.digest import file_digest, hash_of, read_files, state
from casp.run.files import is_temporary, lock, make_folder, publish, write_atomically, write_json
from casp.run.outputs import RUN_FILE, VERSION, check_folder, read_record, refuse_inputs

LOG_FILE, LOCK_FILE = "casp_run.log", "casp_run.lock"
RANKS_FILE = "casp_ranks.json"  # what each of several ranks did, waited and held; no stage reads it
WORK_PREFIX = "work-"  # of files that only the work needs; the finished folder has none
RESULT = "result"  # what becomes the finished folder
_ATTEMPTS = 100  # at a folder that other processes finish and remove at the same time


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What two fingerprints differ in, in words."""
    flat_old, flat_new = ({**f, **f.get("settings", {})} for f in (old, new))
    keys = [
        k for k in sorted(flat_old.keys() | flat_new.keys()) if k != "settings" and flat_old.get(k) != flat_new.get(k)
    ]
    shown = [k if k in ("model", "calibration") else f"{k} {flat_old.get(k)} -> {flat_new.get(k)}" for k in keys]
    return ", ".join(shown)


def _peak() -> int:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def work_place(output: Path) -> Path:
    """The folder that the run towards `output` lives in."""
    if output.name in ("", ".."):  # said by dots alone
        output = Path(os.path.abspath(output))
    return output.with_name(output.name + ".partial")


def check_places(output: Path, inputs: Iterable[Path], flag: str = "--output") -> None:
    """UserError, before any work, where a run towards `output` would touch `inputs` or what no run of ours made."""
    _check_paths(output, inputs, flag)
    if work_place(output).exists():
        _refuse_foreign(work_place(output), flag)


def _check_paths(output: Path, inputs: Iterable[Path], flag: str = "--output") -> None:
    check_folder(output, inputs, flag)
    refuse_inputs(work_place(output), inputs, flag)


def _refuse_foreign(folder: Path, flag: str) -> None:
    """UserError unless `folder` was made by a run and holds nothing but its files."""
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder}, where this run works, is no folder; move it away or choose another {flag}.")
    known = {RUN_FILE, LOG_FILE, RESULT} if read_record(folder) is not None else set()
    for file in sorted(folder.iterdir()):
        ours = file.name in {LOCK_FILE, *known} or is_temporary(file)
        ours = ours or (known and file.name.startswith(WORK_PREFIX))
        if not ours or file.is_symlink():
            raise UserError(
                f"{folder}, where this run works, holds {file.name}, which no run of CASP put there; move it away or "
                f"choose another {flag}."
            )


class WorkFolder:
    """The work of one stage on one model, from its first block to the finished folder.

    settings: everything that decides the outcome, JSON-able, for the record and the fingerprint;
    calibration: fingerprint of the calibration batches ("" when the stage uses none); inputs: what the stage reads
    besides the model, folders and files, none of which the output may touch; ranks: whose run it is. Rank 0 alone
    locks, logs and commits; each writes files of its own, which no other writes, and all must see one file system.
    """

    kind = "moments"  # of `casp.run.outputs.KINDS`
    flag = "--output"  # by which the user named the folder

    def __init__(
        self,
        output: Path,
        decoder: Decoder,
        stage: str,
        base_model: str,
        settings: dict[str, Any],
        calibration: str,
        inputs: Iterable[Path] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        self.output, self.decoder, self.stage, self.ranks = Path(output), decoder, stage, ranks
        self.base_model, self.settings = base_model, settings
        inputs = [decoder.folder, *inputs]
        _check_paths(self.output, inputs, self.flag)
        self.folder = work_place(self.output)
        self.result = self.folder / RESULT
        # Rank 0 reads the model first: its digests are kept for the others on its machine.
        ranks.told(lambda: [file_digest(file) for file in read_files(decoder.folder)])
        self._sources = {file: (state(file), file_digest(file)) for file in read_files(decoder.folder)}
        self.fingerprint = {
            "stage": stage,
            "model": hash_of({file.name: digest for file, (_, digest) in self._sources.items()}),
            "calibration": calibration,
            "settings": settings,
        }
        other = _difference(ranks.told(lambda: self.fingerprint), self.fingerprint)
        if other:
            raise UserError(f"this rank does not see what rank 0 does (differs in: {other}); give all ranks one disk.")
        self.began = time.perf_counter()
        self._lock: IO[bytes] | None = None
        self.done: bool = ranks.told(self._enter)

    def _enter(self) -> bool:
        """Take the run's folder; True where the result stands already and there is nothing to do."""
        for _ in range(_ATTEMPTS):
            if self._is_finished():
                self._clear_up()
                return True
            try:
                make_folder(self.folder)
                _refuse_foreign(self.folder, self.flag)
                self._lock = lock(self.folder / LOCK_FILE)
            except FileNotFoundError:
                continue  # the process that had it has just removed it
            except OSError as error:
                raise UserError(
                    f"{self.folder} cannot be written ({error.strerror}); choose another {self.flag}."
                ) from error
            if self._lock is None:
                raise UserError(f"another process is writing {self.folder}; wait for it or choose another {self.flag}.")
            if not self._is_finished():
                self._begin()
                return False
            self.release()
        raise UserError(f"{self.folder} changes all the time; wait for other processes or choose another {self.flag}.")

    def _is_finished(self) -> bool:
        check_folder(self.output, flag=self.flag)
        record = read_record(self.output) if self.output.exists() else None
        if record is None:
            return False
        if record["fingerprint"] != self.fingerprint:
            raise UserError(
                f"{self.output} is the result of another run (differs in: "
                f"{_difference(record['fingerprint'], self.fingerprint)}); choose another {self.flag} or move it away."
            )
        return True

    def _begin(self) -> None:
        record = read_record(self.folder)
        if record is None:
            self._write_record(self.folder)
        elif record["fingerprint"] != self.fingerprint:
            self.release()
            raise UserError(
                f"{self.folder} was begun by another run (differs in: "
                f"{_difference(record['fingerprint'], self.fingerprint)}); choose another {self.flag}, or move it away "
                "where that run is not to be resumed."
            )
        self.result.mkdir(exist_ok=True)

    def _write_record(self, folder: Path) -> None:
        record = {"version": VERSION, "kind": self.kind, "base_model": self.base_model, "fingerprint": self.fingerprint}
        write_json(folder / RUN_FILE, record)

    def check_sources(self) -> None:
        """UserError where the model's files are no longer those that the run began with; before anything is kept."""
        for file, (then, digest) in self._sources.items():
            try:
                same = state(file) == then or file_digest(file) == digest
            except OSError:
                same = False
            if not same:
                raise UserError(
                    f"{file} was changed while the run read it; put it back and run the same command again, or choose "
                    f"another {self.flag} for the model as it is now."
                )

    @property
    def anew(self) -> str:
        """The remedy for work that is damaged."""
        return f"move {self.folder} away and run the same command again: it begins anew"

    @contextmanager
    def reading(self, file: Path) -> Iterator[None]:
        """Inside the block, what is wrong with `file`, which this run wrote, is told with the remedy for that."""
        try:
            yield
        except (UserError, SafetensorError, OSError) as error:
            raise UserError(f"{file}, work of this run, is damaged ({in_brief(error)}); {self.anew}.") from error

    def read_shard(self, file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a safetensors file that this run wrote; UserError where it is damaged."""
        with self.reading(file):
            _, metadata = read_header_with_metadata(file)
            return load_file(file), metadata

    def log(self, line: str) -> None:
        """Append a line with the time of day to the run's log, on rank 0."""
        if not self.ranks.first:
            return
        with (self.folder / LOG_FILE).open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def account(self) -> str:
        """What this attempt took so far: "in 90 s, at most 1.86 GB of memory", the GPU's besides where one was used."""
        words = f"in {time.perf_counter() - self.began:.0f} s, at most {_peak() / 1e9:.2f} GB of memory"
        if torch.cuda.is_initialized():
            words += f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU"
        return words

    def close(self, names: Collection[str]) -> Path:
        """Commit, when all ranks are here: `result`, with the files `names` and no others, becomes `output`."""
        accounts = self.ranks.gathered({**self.ranks.account(), "peak_bytes": _peak()})
        self.ranks.told(lambda: self._commit(names, accounts if self.ranks.size > 1 else []))
        self.done = True
        return self.output

    def _commit(self, names: Collection[str], accounts: list[dict[str, Any]]) -> None:
        self.check_sources()
        for file in sorted(self.result.iterdir()):
            if is_temporary(file):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            elif file.name not in {*names, RUN_FILE, LOG_FILE, RANKS_FILE}:
                raise UserError(f"{file} was not written by this run; move it away and run the same command again.")
        if accounts:
            write_json(self.result / RANKS_FILE, accounts)
        self.log(f"finished {self.account()}")
        write_atomically(self.result / LOG_FILE, (self.folder / LOG_FILE).read_bytes())
        self._write_record(self.result)
        try:
            publish(self.result, self.output)
        except OSError as error:
            raise UserError(
                f"{self.output} could not be put in place ({error.strerror}); move away what stands there and run the "
                "same command again: it resumes."
            ) from error
        self._remove()

    def _clear_up(self) -> None:
        """Remove what the run that made `output` left of its work, unless its process is still at it."""
        record = read_record(self.folder)
        try:
            if record is None:
                mine = not {file.name for file in self.folder.iterdir()} - {LOCK_FILE}  # the last that is removed
            else:
                mine = record["fingerprint"] == self.fingerprint
            self._lock = lock(self.folder / LOCK_FILE) if mine else None
        except OSError:
            return  # there is no such folder, or it is not ours
        if self._lock is not None:
            self._remove()

    def _remove(self) -> None:
        """Remove the run's own files, the lock last; what is not ours stays, and then the folder too."""
        try:
            shutil.rmtree(self.result, ignore_errors=True)
            for file in sorted(self.folder.iterdir()):
                if file.name.startswith(WORK_PREFIX) or is_temporary(file):
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
            for name in (LOG_FILE, RUN_FILE, LOCK_FILE):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()
        except OSError:
            pass  # optional: the result stands
        finally:
            self.release()

    def release(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
