"""Keeping the process as small as what it holds.

glibc keeps freed memory for later use, and after a block whose tensors were of many sizes what it keeps lies in holes
that the next block's tensors do not fit, and the peak rises block after block. Handing the holes back after every
block keeps it level, at no cost in time.
"""

import ctypes
from functools import cache


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library, where it is one that can hand freed memory back (glibc)."""
    try:
        library = ctypes.CDLL(None)
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (OSError, TypeError, AttributeError):  # Windows, macOS, musl: their allocators see to it themselves
        return None
    return library


def return_freed_memory() -> None:
    """Hand freed memory back to the system."""
    if (library := _libc()) is not None:
        library.malloc_trim(0)
