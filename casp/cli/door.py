"""How every command behaves at its door: bad flags and bad input are one sentence on stderr and exit status 2."""

import argparse
import errno
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from safetensors import SafetensorError
from tqdm import tqdm

from casp.errors import UserError
from casp.interrupts import raise_again
from casp.ranks import opened
from casp.run.recipe import given


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, like all others; --help shows defaults as written.

    A bad value is a UserError, as all bad input is; flags that are unknown or missing end the process at once.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(exit_on_error=False, **settings)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, with bad values told as UserError."""
        try:
            return super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            raise UserError(f"{error.argument_name} {error.message} (see --help).") from error

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As argparse's; `given` of what it returns are the settings for a recipe (`casp.run.recipe`)."""
        found = super().parse_args(args, namespace)
        found.given = given(found, self)
        return found

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the flags and exit with 2."""
        tell(f"error: {message} (see --help).")
        raise SystemExit(2)


def tell(message: str) -> None:
    """Print a message as one line on stderr, below any progress bars, which are not drawn again after it."""
    for bar in list(getattr(tqdm, "_instances", ())):  # tqdm itself has no other list of the bars that are open
        bar.close()
    print(" ".join(message.split()), file=sys.stderr)


class _AboveBars(logging.Handler):
    """Prints what the libraries and we warn of on lines of their own, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


_ABOVE_BARS = _AboveBars(logging.WARNING)


def ending(error: BaseException) -> tuple[str, int] | None:
    """The one sentence that an error is told in and the exit status; None for what nobody foresaw."""
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command resumes.", 130
    if isinstance(error, OSError | SafetensorError):
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if full or isinstance(error, PermissionError):
            denied = f"no permission ({getattr(error, 'filename', None)}); choose another folder"
            reason = "the disk is full; free some space" if full else denied
            return f"error: {reason} and run the same command again: it resumes.", 2
    return None


def run_main(main: Callable[[], None], shared: bool = False) -> NoReturn:
    """Run a stage; bad input and a full disk end in one sentence on stderr and exit status 2.

    shared: whether several ranks may run it together (`casp.ranks`).
    """
    logging.getLogger("casp").addHandler(_ABOVE_BARS)
    try:
        raise_again()
        with opened(ending, tell, shared):
            main()
    except BaseException as error:
        told = ending(error)
        if told is None:
            raise
        tell(told[0])
        raise SystemExit(told[1]) from None
    raise SystemExit(0)
