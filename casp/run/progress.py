"""How far a stage is: a bar in the terminal, and whoever listens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """`done` of the `total` blocks that `stage` still had to do when it began are finished."""

    stage: str
    done: int
    total: int


Listener = Callable[[Progress], None]
_LISTENER: ContextVar[Listener | None] = ContextVar("casp progress", default=None)


@contextmanager
def told_to(listener: Listener | None) -> Iterator[None]:
    """Inside the block, in this thread, `listener` is called whenever a stage has finished a block; None: nobody."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


class Blocks:
    """The bar of a stage that has `total` blocks to do."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.done, self.total = stage, 0, total
        self.bar = tqdm(total=total, desc=stage, unit="block", dynamic_ncols=True)
        self._tell()

    def _tell(self) -> None:
        listener = _LISTENER.get()
        if listener is not None:
            listener(Progress(self.stage, self.done, self.total))

    def update(self) -> None:
        """One more block is finished."""
        self.done += 1
        self.bar.update()
        self._tell()

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def counted(items: Sequence[T], stage: str) -> Iterator[T]:
    """`items` one by one; each is finished when the next is asked for."""
    blocks = Blocks(stage, len(items))
    for item in items:
        yield item
        blocks.update()
    blocks.close()
