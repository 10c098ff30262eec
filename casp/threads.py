"""Sharing out compiled loops over rows among threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch

_LEAST_ROWS = 32  # for a thread: fewer are not worth waking it


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def over_rows(function: Callable[[slice], None], rows: int) -> None:
    """Call `function`, which releases the lock, on slices of 0 to `rows`, in as many threads as torch uses."""
    threads = min(torch.get_num_threads(), rows // _LEAST_ROWS)
    if threads < 2:
        function(slice(0, rows))
        return
    bounds = [rows * part // threads for part in range(threads + 1)]
    slices = [slice(begin, end) for begin, end in pairwise(bounds)]
    for _ in _pool(threads).map(function, slices):
        pass
