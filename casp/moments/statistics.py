"""What passes over a block tell, in parts: several ranks add up moments at the same time, each its own.

A batch is run by one rank, and what it adds to every moment goes to the rank that adds that moment up, in the order of
the batches. So every moment is the sum of the same terms in the same order as in one process, and the work on the sums,
which is the same for a batch of any length, is shared out.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor

from casp.moments.second_moment import SecondMoment, Summands, absorb_all
from casp.ranks import Message, Ranks

Key = tuple[str, str]
"""The path of a linear, relative to its block, and which of its moments."""


class Statistics(ABC):
    """Moments by key, and what is known besides them."""

    @abstractmethod
    def moments_by_key(self) -> dict[Key, SecondMoment | Summands]:
        """All moments, in a fixed order."""

    @abstractmethod
    def told(self) -> tuple[dict[str, Any], Iterable[Tensor]]:
        """What is known besides the moments, and of what sizes these are: JSON-able, and tensors."""

    @abstractmethod
    def hear(self, told: dict[str, Any], tensors: Iterator[Tensor]) -> None:
        """Add what `told` of another one says; make moments of its sizes where there are none yet."""

    def parts(self, ranks: Ranks) -> list[Message]:
        """What each rank is to absorb of these, whose moments are `Summands`: those it adds up, and all the rest."""
        kept = self.moments_by_key()
        owners = ranks.owners([moment.size**2 for moment in kept.values()])
        header, tensors = self.told()
        beside = list(tensors)
        return [
            self._message([key for key, owner in zip(kept, owners, strict=True) if owner == rank], header, beside)
            for rank in range(ranks.size)
        ]

    def held(self) -> Message:
        """The moments alone that something was added to here, for the rank that writes all."""
        return self._message([key for key, moment in self.moments_by_key().items() if not moment.is_empty])

    def absorb(self, message: Message) -> None:
        """Add what a message of another one says: the outcome is that of having run its batches here."""
        told, listed = message.header
        tensors = iter(message.tensors)
        if told is not None:
            self.hear(told, tensors)
        kept = self.moments_by_key()
        for path, name, counts in listed:
            absorb_all(kept[path, name], counts, tensors)

    def _message(self, keys: Collection[Key], told: Any = None, beside: Iterable[Tensor] = ()) -> Message:
        kept = self.moments_by_key()
        listed = [[*key, kept[key].counts] for key in keys]
        return Message([told, listed], chain(beside, (product for key in keys for product in kept[key].products)))
