"""Ctrl-C while a command line of ours still loads its libraries, before `casp.cli.run_main` can take it.

An exception would not do: it would be raised in the middle of some library's import, which may take it for something
else (NumPy makes an ImportError of it).
"""

import os
import signal
import sys
from types import FrameType

_PACKAGES = ("casp", "casp_svd", "casp_gptq", "casp_quip_sharp", "casp_aqlm", "casp_eval")


def _end(number: int, frame: FrameType | None) -> None:
    sys.stdout.flush()
    print("interrupted.", file=sys.stderr, flush=True)
    os._exit(130)


def tell_in_one_line() -> None:
    """End on Ctrl-C with one line and status 130, where this process is the command `casp` or `python -m` of one of
    our packages.

    A process that merely imports casp keeps its own way with Ctrl-C, and one that ignores it goes on doing so.
    """
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    is_command = len(words) > 1 and os.path.basename(words[1]) == "casp"
    ours = is_command or module.partition(".")[0] in _PACKAGES
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Let Ctrl-C be a KeyboardInterrupt from now on: everything is loaded."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
