"""Keeping a compiled library off the standard output, which belongs to what the program has to say."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent_stdout() -> Iterator[None]:
    """While open, what compiled code writes to file descriptor 1 is lost; Python's own output is written before it.

    HiGHS leaves lines of debugging there whatever its options say. They pass through the C library's buffer, which is
    emptied before the descriptor is given back.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # no standard output at all
        yield
        return
    flush = ctypes.CDLL(None).fflush
    flush(None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
