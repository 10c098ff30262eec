"""Ctrl-C while a command line of ours still loads its libraries, before `casp.cli.run_main` can take it."""

import os
import sys
from types import TracebackType


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stdout.flush()
        print("interrupted.", file=sys.stderr, flush=True)
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


def tell_in_one_line() -> None:
    """End on Ctrl-C with one line and status 130, where this process is the command `casp` or `python -m` of one of
    our packages.

    A process that merely imports casp keeps its own way with Ctrl-C.
    """
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    is_command = len(words) > 1 and os.path.basename(words[1]) == "casp"
    if is_command or module.partition(".")[0] in ("casp_svd", "casp_gptq", "casp_quip_sharp", "casp_eval"):
        sys.excepthook = _quiet
