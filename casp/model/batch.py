"""A batch of token sequences as a model takes it, and what only losses read of it."""

import torch
from torch import Tensor


class Batch(dict[str, Tensor]):
    """What `model(**batch)` takes, CPU tensors by name, with one thing that the model is not given.

    answers: (batch, tokens) bool, True where the assistant of a chat speaks; None for plain text.
    """

    answers: Tensor | None = None

    @classmethod
    def of_chats(cls, given: dict[str, Tensor], answers: Tensor) -> "Batch":
        """A batch of chats."""
        batch = cls(given)
        batch.answers = answers
        return batch


def answers_of(batch: dict[str, Tensor]) -> Tensor | None:
    """`Batch.answers`; None for a batch that is a plain dict."""
    return batch.answers if isinstance(batch, Batch) else None


def predicting(text: Tensor, answers: Tensor | None = None) -> Tensor:
    """(batch, tokens) bool: the positions whose next token a loss asks for.

    text: True where a token of text stands, False for padding, pictures and video; answers: as in `Batch`. A position
    has a loss where it and the next one hold text, in a chat only where the assistant says the next one: what is asked
    cannot be told from what came before, and would drown what is to be answered.
    """
    text = text.bool()
    said = text if answers is None else text & answers
    return torch.cat([text[:, :-1] & said[:, 1:], torch.zeros_like(text[:, :1])], dim=1)
