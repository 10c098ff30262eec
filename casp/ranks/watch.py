"""One failing rank ends the run, with one sentence on rank 0 that names it and its host, within a minute.

Every rank has a thread that counts in the store that all of them see. Who fails says so there; who is killed, stopped
or cut off counts no more. Rank 0 watches all others and tells; these watch rank 0 and end when the run has failed.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from torch import distributed as dist

BEAT = 1.0  # seconds between two signs of life
PATIENCE = 40.0  # without one, after which a rank is lost: more than any library keeps Python's lock
GRACE = 3.0  # for rank 0 to meet the same error itself, as with bad input, which all ranks meet
AFTER_TERM = 4.0  # between rank 0 being told to end and the ranks that are silent by then being those that died
_RESUMES = "the same command resumes, with any number of processes"


class Watch:
    """This rank's thread; `tell` prints a sentence."""

    def __init__(self, store: dist.Store, rank: int, size: int, tell: Callable[[str], None]) -> None:
        self._store, self._rank, self._size, self._tell = store, rank, size, tell
        self._ended, self._failing = threading.Event(), threading.Event()
        self._terminated: float | None = None
        self._seen: dict[int, tuple[bytes, float]] = {}
        store.set(f"host/{rank}", socket.gethostname())
        store.set(f"beat/{rank}", "0")
        self._thread = threading.Thread(target=self._run, name="casp ranks", daemon=True)

    def start(self) -> None:
        """Begin, once all ranks are there."""
        signal.signal(signal.SIGTERM, self._on_term)
        self._thread.start()

    def leave(self) -> None:
        """This rank is done; rank 0 returns when all others are, for the store may end with it."""
        self._store.set(f"left/{self._rank}", "")
        others = [f"left/{rank}" for rank in range(1, self._size)]
        while self._rank == 0 and not self._store.check(others):
            time.sleep(BEAT / 20)
        self._ended.set()
        self._thread.join()

    def fail(self, sentence: str, status: int) -> None:
        """End the run because of this rank; returns when rank 0 has said so, or, if this is it, when the others end."""
        self._failing.set()
        self._failed(sentence, status)

    def _failed(self, sentence: str, status: int) -> None:
        """Have the others end, and wait a little for it: the store that tells them may end with rank 0."""
        others = [f"left/{rank}" for rank in range(1, self._size)]
        until = time.monotonic() + (2 * GRACE if self._rank else 2 * BEAT)
        with suppress(RuntimeError):  # the store may have ended, and with it the run
            record = {"rank": self._rank, "sentence": sentence, "status": status}
            self._store.compare_set("failed", "", json.dumps(record))
            if self._rank == 0:
                self._store.set("told", "")
            while time.monotonic() < until and not self._store.check(["told"] if self._rank else others):
                time.sleep(BEAT / 10)
            self._store.set(f"left/{self._rank}", "")

    def lost_contact(self) -> None:
        """Another rank cannot be reached: this one ends when it is known which."""
        time.sleep(2 * PATIENCE)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM, by who started the ranks: the user wants an end, or one of them has died."""
        if self._rank == 0:
            self._terminated = time.monotonic()
        elif not self._failing.is_set():
            try:
                self._store.set(f"left/{self._rank}", "")
            finally:
                os._exit(128 + signal.SIGTERM)

    def _run(self) -> None:
        beats = 0
        while not self._ended.wait(BEAT):
            beats += 1
            try:
                self._store.set(f"beat/{self._rank}", str(beats))
                self._look()
            except RuntimeError:
                if not self._ended.is_set():
                    self._end("error: the store that all ranks share has ended, and rank 0 with it.", 1)

    def _look(self) -> None:
        if self._store.check(["failed"]):
            record = json.loads(self._store.get("failed"))
            if record["rank"] != self._rank:
                self._end(f"error: {self._name(record['rank'])}{record['sentence']}", record["status"])
            return
        now = time.monotonic()
        silences = {rank: self._silence(rank, now) for rank in (range(1, self._size) if self._rank == 0 else [0])}
        patience = PATIENCE
        if self._terminated is not None:
            if now - self._terminated < AFTER_TERM:
                return
            patience = AFTER_TERM - 2 * BEAT
        for rank, silence in silences.items():
            if silence > patience and not self._store.check([f"left/{rank}"]):
                self._end(
                    f"error: {self._name(rank)} does not answer any more, it was killed (for lack of memory?), stopped "
                    f"or cut off; {_RESUMES}.",
                    1,
                )
        if self._terminated is not None:
            self._end(f"terminated; {_RESUMES}.", 128 + signal.SIGTERM)

    def _silence(self, rank: int, now: float) -> float:
        """For how many seconds a rank has counted no further."""
        beat = self._store.get(f"beat/{rank}")
        if rank not in self._seen or self._seen[rank][0] != beat:
            self._seen[rank] = (beat, now)
        return now - self._seen[rank][1]

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._store.get(f'host/{rank}').decode()}"

    def _end(self, sentence: str, status: int) -> None:
        """End this process, unless it is about to end by itself; rank 0 tells why."""
        if self._failing.wait(GRACE if self._rank == 0 else 0):
            self._ended.wait()
        if self._rank == 0:
            sys.stdout.flush()
            self._tell(sentence)
            sys.stderr.flush()
            self._failed("", status)
        else:
            with suppress(RuntimeError):  # the store may have ended with rank 0
                self._store.set(f"left/{self._rank}", "")
        os._exit(status)
