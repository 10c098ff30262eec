"""Rows of a matrix in strips: what is held while GPTQ or QuIP# round them, a dozen times their size, stays bounded.

Once columns have their order or their rotation, a row is rounded without regard to the others, but for the walks of a
trellis, which are 256 rows long, and for when sweeps stop. Rotating a matrix and telling its error take it whole.
"""

from collections.abc import Iterator

LARGEST = 2**26
"""Weights of a strip: a dozen float32 copies of it are as large as the moment of 28,672 inputs, 3.3 GB."""
_MULTIPLE = 256  # rows: whole sequences of a trellis


def row_strips(rows: int, columns: int, largest: int = LARGEST) -> Iterator[slice]:
    """Slices of about equal height that together are `rows`, none above `largest` weights if 256 rows are not."""
    number = -(-rows * columns // largest)
    if number <= 1:
        yield slice(0, rows)
        return
    height = -(-rows // (number * _MULTIPLE)) * _MULTIPLE
    if height * columns > largest:
        height = max(height - _MULTIPLE, _MULTIPLE)
    for first in range(0, rows, height):
        yield slice(first, min(first + height, rows))
