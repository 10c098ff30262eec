"""What the ranks of a run tell each other, in an order that does not depend on how many there are.

Floating-point addition is not associative, so a sum keeps its bytes only where its terms and their order are kept. The
terms are those of the items (batches, blocks, windows), which no number of ranks changes, and one rank adds
each sum up in the order of the items: what one process alone does, term by term.
"""

import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

_POLL = 0.02  # seconds between two looks at the store
_JSON = "utf-8"


class LostContact(Exception):
    """Another rank does not answer: a consequence, whose cause `casp.ranks.watch` finds."""


@dataclass(frozen=True)
class Message:
    """What a rank found out about one item: `header`, JSON-able, and tensors, read once and in order."""

    header: Any
    tensors: Iterable[Tensor] = ()


class Ranks:
    """This process among the processes of a run: number `rank` of `size`, of which 0 prints, adds up and commits.

    What tells or asks others must be called by all ranks, in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None, direct: bool = False) -> None:
        """store: that all ranks see; direct: tensors on GPUs travel between these, else through the CPUs."""
        self.rank, self.size, self.host = rank, size, socket.gethostname()
        self._waited, self._did = 0.0, Counter()
        self._began, self._processors = time.perf_counter(), time.process_time()
        self._store, self._direct, self._calls = store, direct, 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def mine(self, count: int) -> range:
        """Which of so many items are this rank's: every `size`-th."""
        return range(self.rank, count, self.size)

    def shared_out(self, costs: Sequence[float]) -> list[int]:
        """Which items are this rank's where each costs something else, in order.

        Greedy bin packing: the dearest first, each to whom least was given (Graham, SIAM J. Appl. Math. 17, 1969).
        """
        return [item for item, rank in enumerate(self.owners(costs)) if rank == self.rank]

    def owners(self, costs: Sequence[float]) -> list[int]:
        """The rank of each item, as in `shared_out`: the same on all of them."""
        load, owner = [0.0] * self.size, [0] * len(costs)
        for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
            owner[item] = load.index(min(load))
            load[owner[item]] += costs[item]
        return owner

    def did(self, what: str, count: int = 1) -> None:
        """Note that so many of `what` were this rank's, for its account."""
        self._did[what] += count

    def account(self) -> dict[str, Any]:
        """What this rank did since it met the others, JSON-able: seconds by the clock, of them waiting and in exchange,
        seconds of its processors, and how many of what `did` was told of."""
        return {
            "rank": self.rank,
            "host": self.host,
            "seconds": round(time.perf_counter() - self._began, 2),
            "waited": round(self._waited, 2),
            "processor_seconds": round(time.process_time() - self._processors, 2),
            "did": dict(self._did),
        }

    def in_order(
        self,
        items: Iterable[int],
        here: Callable[[int], None],
        away: Callable[[int], Message],
        absorb: Callable[[Message], None],
    ) -> None:
        """All of `items`, of which each rank does its own, as `mine` says, at the same time as the others.

        here(item) on rank 0 does an item and adds it to what there is, away(item) on another does it and tells, and
        absorb(message) on rank 0 adds that: in the order of the items. One item is held at a time.
        """
        for item in items:
            owner = item % self.size
            if owner == self.rank:
                self.did("batches")
                if self.first:
                    here(item)
                else:
                    self._send(away(item), 0)
            elif self.first:
                absorb(self._receive(owner))

    def dealt(self, parts: Sequence[Message] | None, owner: int) -> Message:
        """This rank's part of what rank `owner` found, which gives `parts`, one for each rank; None on the others."""
        if self.rank != owner:
            return self._receive(owner)
        for rank, message in enumerate(parts):
            if rank != owner:
                self._send(message, rank)
        return parts[owner]

    def at_first(self, message: Message) -> Iterator[Message]:
        """On rank 0 what each of the others found, one after the other, each to be read before the next."""
        if not self.first:
            self._send(message, 0)
        else:
            yield from map(self._receive, range(1, self.size))

    def gathered(self, found: Any) -> list[Any]:
        """What each rank found, JSON-able, in the order of the ranks, for all of them."""
        if self.size == 1:
            return [found]
        number = self._number()
        self._put(f"{number}/{self.rank}", found)
        return [self._get(f"{number}/{rank}") for rank in range(self.size)]

    def by_item(self, found: Sequence[Any]) -> list[Any]:
        """What was found of each of the items that are shared out as `mine` says, in their order, for all ranks."""
        parts = self.gathered(list(found))
        return [parts[item % self.size][item // self.size] for item in range(sum(map(len, parts)))]

    def everywhere(self, message: Message | None, owner: int = 0) -> Message:
        """What rank `owner` found, for all ranks; None on the others."""
        if self.size == 1:
            return message
        tensors = [self._outgoing(tensor) for tensor in message.tensors] if self.rank == owner else []
        words = _words(message.header, tensors) if self.rank == owner else b""
        with self._waiting(), _contact():
            length = torch.tensor([len(words)])
            dist.broadcast(length, owner)
            letters = torch.frombuffer(bytearray(words), dtype=torch.uint8) if self.rank == owner else _letters(length)
            dist.broadcast(letters, owner)
            header, form = json.loads(letters.numpy().tobytes().decode(_JSON))
            if self.rank != owner:
                tensors = [_empty(*one) for one in form]
            for tensor in tensors:
                if tensor.numel():
                    dist.broadcast(_flat(tensor), owner)
        return Message(header, tensors)

    def told(self, of_first: Callable[[], Any]) -> Any:
        """What rank 0 alone finds by `of_first`, JSON-able, for all ranks."""
        if self.size == 1:
            return of_first()
        number = self._number()
        if self.first:
            found = of_first()
            self._put(f"{number}", found)
            return found
        return self._get(f"{number}")

    def wait(self) -> None:
        """Until all ranks are here, however long that takes."""
        self.gathered(None)

    def _number(self) -> int:
        self._calls += 1
        return self._calls

    def _put(self, key: str, value: Any) -> None:
        with _contact():
            self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        with self._waiting(), _contact():
            while not self._store.check([key]):
                time.sleep(_POLL)
            return json.loads(self._store.get(key))

    def _send(self, message: Message, rank: int) -> None:
        tensors = [self._outgoing(tensor) for tensor in message.tensors]
        words = _words(message.header, tensors)
        with self._waiting(), _contact():
            dist.send(torch.tensor([len(words)]), rank)
            dist.send(torch.frombuffer(bytearray(words), dtype=torch.uint8), rank)
            for tensor in tensors:
                if tensor.numel():
                    dist.send(_flat(tensor), rank)

    def _receive(self, rank: int) -> Message:
        with self._waiting(), _contact():
            length = torch.zeros(1, dtype=torch.long)
            dist.recv(length, rank)
            words = _letters(length)
            dist.recv(words, rank)
        header, form = json.loads(words.numpy().tobytes().decode(_JSON))
        return Message(header, self._incoming(rank, form))

    def _outgoing(self, tensor: Tensor) -> Tensor:
        return (tensor if self._direct else tensor.cpu()).contiguous()

    def _incoming(self, rank: int, form: list[tuple[str, list[int], str]]) -> Iterator[Tensor]:
        for one in form:
            found = _empty(*one)
            if found.numel():
                with self._waiting(), _contact():
                    dist.recv(_flat(found), rank)
            yield found

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began


def _words(header: Any, tensors: Sequence[Tensor]) -> bytes:
    """What travels before the tensors: the header, and type, shape and device of each."""
    form = [[str(t.dtype).removeprefix("torch."), list(t.shape), t.device.type] for t in tensors]
    return json.dumps([header, form]).encode(_JSON)


def _letters(length: Tensor) -> Tensor:
    return torch.empty(int(length), dtype=torch.uint8)


def _flat(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor: not every type that is stored has a way of its own."""
    return tensor.reshape(-1).view(torch.uint8)


def _empty(dtype: str, shape: list[int], device: str) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device=device)


@contextmanager
def _contact() -> Iterator[None]:
    """Inside the block, what torch.distributed raises is that another rank cannot be reached."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise LostContact(str(error)) from error


ALONE = Ranks()
"""The one process of a run that nobody started as one of several."""
