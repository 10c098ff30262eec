"""Where a result may be written: never into what is read, never over what this tool did not make.

A folder is ours when it carries the record of a run, `casp_run.json`; a file of figures when it holds the figures
that the same script writes. Everything else that exists belongs to the user.
"""

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from casp.demo import cache_folder, kept_in_cache
from casp.errors import UserError
from casp.reading.documents import read_json
from casp.run.files import make_folder, try_to_write

RUN_FILE = "casp_run.json"
VERSION = 1
KINDS = {
    "checkpoint": "a compressed checkpoint",
    "moments": "a folder of moments",
    "costs": "a folder of priced options",
    "export": "an exported checkpoint",
}
"""Kind of run -> what its folder is, in words."""


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the run that `folder` is the work or the result of; None where it has none that we wrote."""
    try:
        record = read_json(folder / RUN_FILE, "the record of a run")
    except UserError:
        return None
    if record.get("version") != VERSION or record.get("kind") not in list(KINDS):
        return None
    fingerprint = record.get("fingerprint")
    return record if isinstance(fingerprint, dict) and isinstance(fingerprint.get("settings"), dict) else None


def refuse_inputs(path: Path, inputs: Iterable[Path], flag: str = "--output") -> None:
    """UserError where `path` is one of `inputs` or lies inside one, by whatever links or dots it is named.

    What CASP keeps in its cache is everybody's input.
    """
    real, cache = _real(path, flag), _real(cache_folder(), "CASP_CACHE")
    if cache in real.parents and kept_in_cache(real.relative_to(cache).parts[0]):
        raise UserError(f"{flag} {path} lies in the cache of the built-in models, {cache}; choose another {flag}.")
    for source in inputs:
        other = _real(source, flag)
        if real == other:
            raise UserError(f"{flag} {path} is an input of this run, which is never written; choose another {flag}.")
        if other in real.parents:
            raise UserError(f"{flag} {path} lies inside {source}, an input of this run; choose another {flag}.")


def _real(path: Path, flag: str) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {str(path)[:80]!r} is no usable path; choose another {flag}.") from error


def check_folder(output: Path, inputs: Iterable[Path] = (), flag: str = "--output") -> None:
    """UserError unless `output` is absent, an empty folder or the result of a run, and apart from `inputs`."""
    refuse_inputs(output, inputs, flag)
    _refuse_root(output, flag)
    try:
        if output.is_symlink():
            raise UserError(f"{flag} {output} is a symbolic link; give the folder that it stands for or another one.")
        if not output.exists():
            return
        if not output.is_dir():
            raise UserError(f"{output} exists and is not a folder; choose another {flag}.")
        empty = not any(output.iterdir())
    except OSError as error:
        raise UserError(f"{flag} {_short(output)} cannot be read ({error.strerror}); choose another {flag}.") from error
    if not empty and read_record(output) is None:
        raise UserError(f"{output} holds other files; choose another {flag}.")


def _refuse_root(folder: Path, flag: str) -> None:
    if not _real(folder, flag).name:
        raise UserError(f"{flag} {folder} is the root of the file system; name a folder below it.")


def make_output(folder: Path, flag: str = "--output") -> None:
    """Folder `folder`, and those above it, for what a command writes; UserError where it cannot be made, and for the
    root of the file system."""
    _refuse_root(folder, flag)
    try:
        make_folder(folder)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{flag} {_short(folder)!r} cannot be made ({reason}); choose another {flag}.") from error


def check_file(path: Path, shapes: Iterable[Collection[str]], inputs: Iterable[Path] = ()) -> None:
    """UserError unless file `path` is absent or holds figures of an earlier run, and is apart from `inputs`.

    shapes: sets of keys, one of which a JSON object of such figures has.
    """
    refuse_inputs(path, inputs)
    try:
        if not path.exists() and not path.is_symlink():
            return
        found = read_json(path, "the file of figures")
    except UserError:
        found = {}
    except OSError as error:
        raise UserError(
            f"--output {_short(path)} cannot be written ({error.strerror}); choose another --output."
        ) from error
    if not any(set(shape) <= found.keys() for shape in shapes):
        raise UserError(f"{path} exists and holds no figures of this tool; choose another --output.")


def require_writable(path: Path) -> None:
    """UserError where no file could be written at `path`."""
    try:
        try_to_write(path)
    except OSError as error:
        raise UserError(f"--output {_short(path)} cannot be written ({error.strerror}); choose another one.") from error


def check_report(folder: Path, names: Iterable[str], inputs: Iterable[Path], record: str, columns: set[str]) -> None:
    """UserError unless the files `names` of a report may be written into `folder`.

    They may where none of them exists yet, or where the file `record` among them holds rows with `columns`, as an
    earlier report does. Other files in the folder stay. Folders of models and of runs take no report.
    """
    refuse_inputs(folder, inputs)
    _refuse_root(folder, "--output")
    try:
        if (folder / "config.json").exists() or (folder / RUN_FILE).exists():
            raise UserError(f"{folder} is the folder of a model or a run; choose another --output.")
        there = [name for name in names if (folder / name).exists() or (folder / name).is_symlink()]
    except OSError as error:
        raise UserError(
            f"--output {_short(folder)} cannot be read ({error.strerror}); choose another --output."
        ) from error
    try:
        rows = read_json(folder / record, "the report", list)
        ours = all(isinstance(row, dict) and columns <= row.keys() for row in rows)
    except UserError:
        ours = False
    if there and not ours:
        raise UserError(f"{folder / there[0]} exists and is no report of this script; choose another --output.")


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 120 else f"{text[:50]}...{text[-50:]}"
