"""What is warned of while something is computed, kept for its report."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Keep(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def warnings_of(logger: str) -> Iterator[list[str]]:
    """Inside the block, warnings of the logger called `logger` are listed, besides going where they always go."""
    keep = _Keep()
    logging.getLogger(logger).addHandler(keep)
    try:
        yield keep.messages
    finally:
        logging.getLogger(logger).removeHandler(keep)
