"""The one exception that stages raise for input they cannot work with, and how other libraries' errors become one."""

from collections.abc import Iterator
from contextlib import contextmanager

_MOST_LETTERS = 300  # of another library's words in a sentence of ours


class UserError(Exception):
    """Bad input, told in one sentence that names the thing and the remedy; the command line exits with 2."""


def in_brief(error: BaseException) -> str:
    """What an exception says, on one line and not too long, without a final dot."""
    words = " ".join(str(error).split()).rstrip(".:") or type(error).__name__
    return words if len(words) <= _MOST_LETTERS else words[: _MOST_LETTERS - 3] + "..."


@contextmanager
def told_as(what: str, remedy: str) -> Iterator[None]:
    """Inside the block, whatever a library raises over what a user gave is the UserError "WHAT (its words): REMEDY".

    For calls of transformers, tokenizers, safetensors, Pillow and datasets on a user's files alone: each raises what
    it likes, and tokenizers even exceptions that are no Exception.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(f"{what} ({in_brief(error)}): {remedy}") from error
