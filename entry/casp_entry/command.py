"""The command `casp`: `casp svd ...`, `casp compress ...`, each with the flags of its script.

Commands are entry points of the group `casp.commands`, functions that take a list of arguments; `casp quantize
--backend NAME ...` is the quantizing stage of that backend (group `casp.backends`).
"""

import importlib
import os
import sys
from importlib.metadata import entry_points, version

from casp_entry import torchrun

COMMANDS, BACKENDS = "casp.commands", "casp.backends"
QUANTIZE = "quantize"


def usage() -> str:
    """What `casp --help` prints."""
    names = sorted({*entry_points(group=COMMANDS).names, QUANTIZE})
    backends = sorted(entry_points(group=BACKENDS).names)
    return (
        f"usage: casp COMMAND [flags]\n\ncommands: {', '.join(names)}\n\n"
        f"`casp COMMAND --help` explains the flags of a command; `casp {QUANTIZE}` takes --backend first: "
        f"{', '.join(backends)}."
    )


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _quantizer(words: list[str]) -> tuple[str | None, list[str]]:
    """The value of --backend among `words`, and what is left."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--backend":
            if equals:
                return value, words[:place] + words[place + 1 :]
            return (words[place + 1] if place + 1 < len(words) else None), words[:place] + words[place + 2 :]
    return None, words


def in_processes(module: str, words: list[str]) -> None:
    """Where CASP_PROCESSES is set, go on as `python -m MODULE WORDS...` in as many ranks as can share it."""
    if os.environ.get(torchrun.PROCESSES):
        torchrun.main(["-m", module, *words])


def main() -> int:
    """Run the command that the arguments name; returns or raises its exit status."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"casp {version('casp')}")
        return 0
    name, rest = words[0], words[1:]
    if name == QUANTIZE:
        backend, rest = _quantizer(rest)
        found = entry_points(group=BACKENDS, name=backend) if backend else ()
        if not found:
            known = ", ".join(sorted(entry_points(group=BACKENDS).names))
            return _fail(f"casp {QUANTIZE} needs --backend, one of {known}; the other flags are that backend's.")
        (point,) = found
        module = point.module.partition(".")[0]
        in_processes(module, rest)
        from casp.cli import run_main

        stage = importlib.import_module(f"{module}.__main__").main
    else:
        found = entry_points(group=COMMANDS, name=name)
        if not found:
            return _fail(f"casp has no command {name[:40]!r}; `casp --help` lists them.")
        (point,) = found
        in_processes(point.module.removesuffix(".__main__"), rest)
        from casp.cli import run_main

        stage = point.load()
    run_main(lambda: stage(rest))
