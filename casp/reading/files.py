"""Regular files and folders, and reading no more of a file than is expected."""

import os
import stat
from pathlib import Path

from casp.errors import UserError


def _status(path: Path, what: str) -> os.stat_result:
    try:
        return os.stat(path)
    except FileNotFoundError as error:
        raise UserError(f"{what} {path} cannot be read (no such file); correct the path or get it again.") from error
    except OSError as error:
        raise UserError(f"{what} {path} cannot be reached ({error.strerror}); correct the path.") from error
    except ValueError as error:
        raise UserError(f"{what} {str(path)!r} is no name of a file; correct the path.") from error


def require_file(path: Path, what: str) -> int:
    """Size in bytes of the regular file at `path`; UserError for anything else. what: its part, for the message."""
    status = _status(path, what)
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{what} {path} is a folder; give a file.")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{what} {path} is a pipe, a device or a socket; give a regular file.")
    return status.st_size


def require_folder(path: Path, what: str) -> None:
    """UserError unless `path` is a folder."""
    if not is_folder(path, what):
        raise UserError(f"{what} {path} is a file; give a folder.")


def is_folder(path: Path, what: str) -> bool:
    """Whether `path` is a folder; UserError where nothing is there or its name is none."""
    return stat.S_ISDIR(_status(path, what).st_mode)


def is_there(path: Path) -> bool:
    """Whether something, of whatever kind, is at `path`; False for a name that no file can have."""
    try:
        os.lstat(path)
    except (OSError, ValueError):
        return False
    return True


def read_bytes(path: Path, what: str, most: int) -> bytes:
    """All bytes of a regular file of at most `most`; its size is known before anything is read."""
    size = require_file(path, what)
    try:
        with path.open("rb") as file:
            data = file.read(most + 1) if size <= most else b""
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror}); correct its permissions.") from error
    # A file may grow while it is read, and those of /proc say that they are empty.
    size = max(size, len(data))
    if size > most:
        raise UserError(f"{what} {path} has {size} bytes or more, at most {most} are read; give a smaller one.")
    return data


def read_text(path: Path, what: str, most: int) -> str:
    """The text of a regular file in UTF-8 of at most `most` bytes."""
    try:
        return read_bytes(path, what, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text; convert it first.") from error
