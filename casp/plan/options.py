"""What a linear may become: full rank in any of the backend's formats, or one of several ranks, a format a factor."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from casp.backend import Backend, Format
from casp.errors import UserError
from casp.lowrank import rank_for

KEEP_RATIOS = (0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.5625, 0.625, 0.6875, 0.75)
"""Shares of a linear's weights that its low-rank factors may keep."""


@dataclass(frozen=True)
class Option:
    """One way to store a linear.

    rank: None for full rank; formats: of the one stored matrix, or of `down` and `up`; bytes: exact, all of it;
    cost: predicted rise of the model's loss, in nats a token (0 until it is known).
    """

    rank: int | None
    formats: tuple[Format, ...]
    bytes: int
    cost: float = 0.0

    def at(self, cost: float) -> "Option":
        """The same with its cost."""
        return replace(self, cost=cost)


@dataclass(frozen=True)
class LinearOptions:
    """One linear of the decoder with everything that it may become.

    path: from the model's root; influence: of its block, `1 - E[cos(x_l, x_{l+1})]`.
    """

    path: str
    block: int
    role: str
    out_features: int
    in_features: int
    influence: float
    options: tuple[Option, ...]

    @property
    def weights(self) -> int:
        """Weights of the original linear."""
        return self.out_features * self.in_features


def stored_shapes(rank: int | None, out_features: int, in_features: int) -> tuple[tuple[int, int], ...]:
    """(out, in) of what is stored: the matrix, or `down` and `up`."""
    return ((out_features, in_features),) if rank is None else ((rank, in_features), (out_features, rank))


def option_bytes(
    backend: Backend, rank: int | None, formats: Sequence[Format], out_features: int, in_features: int
) -> int:
    """Exact bytes of a linear stored in this way."""
    shapes = stored_shapes(rank, out_features, in_features)
    return sum(backend.bytes(format, *shape) for format, shape in zip(formats, shapes, strict=True))


def chosen_formats(
    backend: Backend, out_features: int, in_features: int, tuned: bool, wanted: Mapping[str, object]
) -> list[Format]:
    """The backend's formats of a shape in ascending bytes, as its words `wanted` ask; UserError for unknown words."""
    try:
        return backend.formats(out_features, in_features, tuned=tuned, **wanted)
    except TypeError as error:
        words = ", ".join(f"{key}={value}" for key, value in wanted.items())
        raise UserError(f"--format {words} is not understood by backend {backend.name!r} ({error}).") from error


def ranks(out_features: int, in_features: int) -> list[int]:
    """The ranks of `KEEP_RATIOS` that save something, rising, each once."""
    found = {rank_for(ratio, out_features, in_features) for ratio in KEEP_RATIOS}
    return sorted(rank for rank in found if rank is not None)


def layouts(
    backend: Backend,
    out_features: int,
    in_features: int,
    low_rank: bool,
    tuned: bool = False,
    wanted: Mapping[str, object] | None = None,
) -> Iterator[Option]:
    """All options of a linear of this shape, without costs."""
    wanted = wanted or {}

    def formats(shape: tuple[int, int]) -> list[Format]:
        return chosen_formats(backend, *shape, tuned, wanted)

    for format in formats((out_features, in_features)):
        yield Option(None, (format,), backend.bytes(format, out_features, in_features))
    for rank in ranks(out_features, in_features) if low_rank else []:
        down, up = stored_shapes(rank, out_features, in_features)
        for of_down in formats(down):
            for of_up in formats(up):
                pair = (of_down, of_up)
                yield Option(rank, pair, option_bytes(backend, rank, pair, out_features, in_features))
