"""Every state that a run leaves on the disk if it dies: recorded from outside, whatever code does the writing.

The interpreter reports each file operation before it happens (an audit hook, PEP 578). A copy of the run's folder at
each is exactly what a kill at that moment leaves, so one recorded run stands for as many killed ones. What is not
reported (bytes reaching a file) lies between two reports or is added: each file of the next state that grew is also
tried empty and half written.

A loss of power leaves less than a kill. Journaling file systems keep the changes of names in their order, but a file's
bytes are only sure to be there once the file was synced. So every state has a twin in which the files that were not
synced as they stand are empty; logs are emptied with them, though they alone make no twin.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
WRITING = 0x1 | 0x2 | 0o100 | 0o1000 | 0o2000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND


@dataclass
class Recorder:
    """Copies `root` to `copies` before each file operation in it, once a distinct state, while it is active."""

    root: Path
    copies: Path
    meanwhile: Callable[[], None] | None = None  # called at each operation: what a second process would do
    operations: int = 0
    states: list[Path] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    dark: list[Path] = field(default_factory=list)  # what a loss of power would leave, where a kill leaves more
    _seen: set[str] = field(default_factory=set)
    _synced: dict[int, tuple] = field(default_factory=dict)  # inode -> what a sync found
    _busy: bool = False

    def see(self, event: str, args: tuple) -> None:
        """The audit hook."""
        if self._busy or not self._concerns(event, args):
            return
        self._busy = True
        try:
            self.operations += 1
            self._keep_dark()
            self.keep(f"before {event} {Path(str(args[0])).name}")
            if self.meanwhile is not None:
                self.meanwhile()
        finally:
            self._busy = False

    def _concerns(self, event: str, args: tuple) -> bool:
        if event == "open":
            if not isinstance(args[0], str | bytes) or not (args[2] or 0) & WRITING:
                return False
        elif event not in CHANGES:
            return False
        path = args[0].decode() if isinstance(args[0], bytes) else str(args[0])
        return path.startswith(str(self.root)) or not path.startswith("/")  # relative to an open folder, as in rmtree

    def keep(self, label: str) -> None:
        """Copy the present state of `root`, unless it was met before."""
        key = fingerprint(self.root)
        if key in self._seen:
            return
        self._seen.add(key)
        copy = self.copies / f"{len(self.states):04d}"
        shutil.copytree(self.root, copy, symlinks=True)
        self.states.append(copy)
        self.labels.append(label)

    def sync(self, number: int) -> None:
        """What an open file or folder was synced as."""
        self._synced[os.fstat(number).st_ino] = _present(number)

    def _is_synced(self, path: Path) -> bool:
        return self._synced.get(path.stat().st_ino) == _present(path)

    def _keep_dark(self) -> None:
        """Copy the present state of `root` without the bytes that were not synced, unless it was met before."""
        lost = [f for f in sorted(self.root.rglob("*")) if f.is_file() and f.stat().st_size and not self._is_synced(f)]
        key = f"dark {fingerprint(self.root)} {lost}"
        if all(file.suffix == ".log" for file in lost) or key in self._seen:
            return
        self._seen.add(key)
        copy = self.copies / f"dark-{len(self.dark):04d}"
        shutil.copytree(self.root, copy, symlinks=True)
        for file in lost:
            (copy / file.relative_to(self.root)).write_bytes(b"")
        self.dark.append(copy)

    def unsure(self) -> list[str]:
        """What `root` holds that a loss of power could still take back: bytes of files, names in folders."""
        found = [self.root, *sorted(self.root.rglob("*"))]
        return [str(path.relative_to(self.root)) for path in found if not self._is_sure(path)]

    def _is_sure(self, path: Path) -> bool:
        if path.is_file():
            return self._is_synced(path)
        synced = self._synced.get(path.stat().st_ino, ())  # whose names may have become fewer since
        return set(os.listdir(path)) <= set(synced)


def _present(file: int | Path) -> tuple:
    """What a sync makes sure of: size and time of a file, the names in a folder."""
    status = os.stat(file)
    return tuple(sorted(os.listdir(file))) if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)


_active: list[Recorder] = []
_fsync = os.fsync


def _noted_fsync(number: int) -> None:
    _fsync(number)
    if _active:
        _active[-1].sync(number)


def _hook(event: str, args: tuple) -> None:
    if _active and (event == "open" or event.startswith("os.")):
        _active[-1].see(event, args)


sys.addaudithook(_hook)  # it cannot be taken out again: without an active recorder it does nothing


@contextlib.contextmanager
def recorded(root: Path, copies: Path, meanwhile: Callable[[], None] | None = None) -> Iterator[Recorder]:
    """Record every state of `root` during the block, that at its end included."""
    copies.mkdir(parents=True)
    recorder = Recorder(root, copies, meanwhile)
    _active.append(recorder)
    os.fsync = _noted_fsync
    try:
        yield recorder
    finally:
        _active.pop()
        os.fsync = _fsync
    recorder.keep("at the end")


def fingerprint(root: Path) -> str:
    """A hash of all names and bytes below `root`; logs by name alone, for they tell the time."""
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*")):
        digest.update(f"{file.relative_to(root)}\n".encode())
        if file.is_file() and file.suffix != ".log":
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def torn(states: list[Path], copies: Path) -> list[Path]:
    """States in which a file that is being written holds nothing, or half of its bytes."""
    made = []
    for number, (before, after) in enumerate(pairwise(states)):
        for file in sorted(f for f in after.rglob("*") if f.is_file()):
            old = before / file.relative_to(after)
            size, had = file.stat().st_size, old.stat().st_size if old.is_file() else 0
            if size <= had or ".casp-tmp" not in str(file.relative_to(after)):
                continue
            for length in {had, (had + size) // 2}:
                copy = copies / f"{number:04d}-{file.name}-{length}"
                shutil.copytree(after, copy)
                with (copy / file.relative_to(after)).open("rb+") as cut:
                    cut.truncate(length)
                made.append(copy)
    return made
