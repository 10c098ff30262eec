"""Changing the disk: every function leaves its file as it was or as it shall be, whatever ends the process."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from safetensors.torch import save_file
from torch import Tensor

_TEMPORARY = ".casp-tmp"


def temporary(path: Path) -> Path:
    """What `path` is called while it is written, beside it: a name that no user gives; the next write replaces it."""
    return path.with_name(f".{path.name}{_TEMPORARY}")


def is_temporary(path: Path) -> bool:
    """Whether `path` bears such a name: what a write that was cut off has left."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


def sync(folder: Path) -> None:
    """Make the names in `folder` survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Folder `path`, and those above it that are missing, such that their names survive a loss of power."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def try_to_write(path: Path) -> None:
    """OSError where a file `path` could not be written, before there is anything to write; nothing is left of it."""
    make_folder(path.parent)
    probe = temporary(path)
    probe.write_bytes(b"")
    probe.unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path` such that `path` holds either what it held before or all of `data`."""
    scratch = temporary(path)
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """`tensors` as one safetensors file with `metadata` in its header, atomically, readable as the umask says."""
    # safetensors writes to a random name beside the one it is given: in a folder of their own both are found again.
    scratch = temporary(path)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        written = scratch / path.name
        stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(stored, written, metadata or {"format": "pt"})  # the order of several keys would be random
        written.chmod(scratch.stat().st_mode & 0o666)  # safetensors makes it 0600
        with written.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(written, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync(path.parent)


def publish(source: Path, target: Path) -> None:
    """Rename folder `source` to `target`, which is absent or empty; OSError leaves both as they were."""
    os.replace(source, target)
    sync(target.parent)


def lock(path: Path) -> IO[bytes] | None:
    """Lock file `path`, made if it is absent, until the returned file is closed; None while another process has it.

    A lock counts only for the file that bears the name: one that was removed since it was opened is let go, and the
    one in its place taken. FileNotFoundError once its folder is gone.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), path.stat()):
                return os.fdopen(handle, "rb+")
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
