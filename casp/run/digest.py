"""What a checkpoint is, as one hash: every byte that a stage reads of it counts.

Reading 140 GB before each resumed run would cost more than it saves, so the digest of a file is kept in the user's
cache and holds as long as the file's size, times of change and inode do. The operating system sets the time of the
last change of the inode (ctime), which no program can put back, so an edit is seen even where it restores the rest.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from casp.demo import DIGESTS, cache_folder
from casp.errors import UserError
from casp.model.shards import read_entries
from casp.reading.documents import read_json
from casp.run.files import write_json

COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
"""Suffixes of what a checkpoint has besides weights: configuration, tokenizer, processor."""

_OURS = {"casp_run.json", "casp_recipe.json", "casp_ranks.json"}
"""How a checkpoint was made; no stage reads it as part of the model."""
_SETTLED = 2_000_000_000  # nanoseconds; a file changed later than that may change again within one tick of its clock
_DELAY = 5  # seconds after which reading shows a bar


def companions(folder: Path) -> list[Path]:
    """The files of a checkpoint beside its weights that a stage reads or copies, by name."""
    return sorted(f for f in folder.iterdir() if f.suffix in COPIED and f.name not in _OURS and f.is_file())


def state(file: Path) -> dict[str, int]:
    """What changes when a file does: size in bytes, times in nanoseconds, inode and device."""
    found = file.stat()
    return {
        "size": found.st_size,
        "mtime": found.st_mtime_ns,
        "ctime": found.st_ctime_ns,
        "inode": found.st_ino,
        "device": found.st_dev,
    }


def _read(file: Path) -> str:
    digest = hashlib.sha256()
    with (
        file.open("rb") as source,
        tqdm(total=file.stat().st_size, desc=f"reading {file.name}", unit="B", unit_scale=True, delay=_DELAY) as bar,
    ):
        while part := source.read(1 << 24):
            digest.update(part)
            bar.update(len(part))
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    """sha256 of all of `file`, in hex; from the cache where it was read before and has not changed since."""
    file = file.resolve()
    now = state(file)
    kept = cache_folder() / DIGESTS / f"{hashlib.sha256(str(file).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(UserError, KeyError, TypeError):
        record = read_json(kept, "a kept digest")
        if record["state"] == now and len(record["sha256"]) == 64:
            return record["sha256"]
    digest = _read(file)
    if state(file) == now and time.time_ns() - max(now["mtime"], now["ctime"]) > _SETTLED:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            kept.parent.mkdir(parents=True, exist_ok=True)
            mine = kept.with_name(f"{kept.stem}-{os.getpid()}.json")  # two processes may read the same model
            write_json(mine, {"file": str(file), "state": now, "sha256": digest})
            os.replace(mine, kept)
    return digest


def read_files(folder: Path) -> list[Path]:
    """Every file that a stage reads of checkpoint `folder`: its weights and their companions."""
    return [*companions(folder), *sorted({entry.shard for entry in read_entries(folder).values()})]


def content_hash(folder: Path) -> str:
    """A hash, in hex, of every byte that is read of checkpoint `folder`, and of the files' names."""
    return hash_of({file.name: file_digest(file) for file in read_files(folder)})


def hash_of(digests: Mapping[str, str]) -> str:
    """One hash, in hex, of files by name -> digest."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()
