"""What the blocks of a decoder are fed: hidden states, arguments, and what kind of token stands where."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from casp.errors import UserError
from casp.model.batch import predicting
from casp.model.split import Expert


class PassedOver(Tensor):
    """What a block that is passed over puts out: a tensor, and alike the tuple around it that older models unpack."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __getitem__(self, index: Any) -> Tensor:
        """The tensor itself as the first of the tuple; else as any tensor."""
        return self if type(index) is int and index == 0 else super().__getitem__(index)


@dataclass
class BatchInputs:
    """One calibration batch as the blocks see it.

    hidden: (batch, tokens, hidden), what the next block is fed; kwargs: one dict of keyword arguments per
    block (tensors shared between blocks are shared here); tokens: (batch, tokens) bool, False for padding;
    images, videos: (batch, tokens) bool, True where a token stands for a picture or for video; answers: where the
    assistant of a chat speaks, None for plain text.
    added: block -> what the model itself adds to the hidden states before that block (deepstack: visual features).

    As a module sees the batch (`seen_by`), `tokens`, `images` and `videos` have an entry for each of its rows.
    """

    hidden: Tensor
    kwargs: list[dict[str, Any]]
    tokens: Tensor
    images: Tensor
    videos: Tensor
    added: dict[int, Tensor] = field(default_factory=dict)
    answers: Tensor | None = None
    _rows: Tensor | None = None
    _foreign: bool = False

    @property
    def text(self) -> Tensor:
        """Where a token of text stands, bool of the shape of `tokens`."""
        return self.tokens & ~self.images & ~self.videos

    @property
    def predicting(self) -> Tensor:
        """Where a loss asks for the next token, see `casp.model.batch.predicting`."""
        return predicting(self.text, self.answers)

    def with_hidden(self, hidden: Tensor) -> "BatchInputs":
        """The same batch with other hidden states."""
        return replace(self, hidden=hidden)

    def without_hidden(self, device: torch.device) -> "BatchInputs":
        """What observers are given: the masks alone, on `device`."""
        masks = (mask.to(device) for mask in (self.tokens, self.images, self.videos))
        return BatchInputs(self.hidden[:, :0], [], *masks)

    def entering(self, index: int, left: Tensor) -> Tensor:
        """What enters block `index` when `left` leaves the block before it."""
        return left + self.added[index].to(left) if index in self.added else left

    def seen_by(self, x: Tensor, expert: Expert | None) -> "BatchInputs":
        """The batch as a module sees it that is given `x` (..., width), a part of `expert` or of none.

        A module may see all tokens, as they are or in one row; an expert's sees those that were routed to it; what sees
        something else than the sequence (cross-attention reads a picture's own states) sees rows that all count alike.
        """
        shape = x.shape[:-1]
        if expert is not None and expert.rows is not None:
            return self._at(expert.rows)
        if shape == self.tokens.shape:
            return self
        if shape.numel() == self.tokens.numel():
            return self._at(torch.arange(shape.numel(), device=x.device).view(shape))
        all_of_them = torch.ones(shape, dtype=torch.bool, device=x.device)
        return replace(self, tokens=all_of_them, images=~all_of_them, videos=~all_of_them, _foreign=True)

    def _at(self, rows: Tensor) -> "BatchInputs":
        masks = (mask.flatten()[rows] for mask in (self.tokens, self.images, self.videos))
        return BatchInputs(self.hidden, self.kwargs, *masks, self.added, _rows=rows)

    def of_rows(self, value: Tensor) -> Tensor:
        """A value of every token, (batch, tokens), for each row that the module sees; 1 for rows that are none."""
        if self._foreign:
            return torch.ones_like(self.tokens, dtype=value.dtype)
        return value if self._rows is None else value.flatten()[self._rows]

    def by_sequence(self, value: Tensor, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Of each row that the module sees a vector, (..., width): as (batch, tokens, width), and which are there."""
        if self._rows is None:
            return value, self.tokens
        whole = value.new_zeros(batch * tokens, value.shape[-1])
        there = torch.zeros(batch * tokens, dtype=torch.bool, device=value.device)
        rows = self._rows.flatten()
        whole[rows], there[rows] = value.flatten(0, -2), self.tokens.flatten()
        return whole.view(batch, tokens, -1), there.view(batch, tokens)


def moved(value: Any, device: torch.device) -> Any:
    """An argument of a block, a tensor or tuples and dicts of them, on `device`."""
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device) for item in value)
    return value


def first_output(output: Any) -> Tensor:
    """The hidden states that a block returns, alone or first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def require_finite(hidden: Tensor, tokens: Tensor, name: str) -> None:
    """UserError where `hidden` (batch, tokens, hidden), what `name` put out, is not finite at one of `tokens`, bool."""
    if not torch.isfinite(hidden[tokens]).all():
        raise UserError(
            f"{name} puts out NaN or infinity; check the model's weights and the calibration data, or run in a wider "
            "--dtype."
        )
