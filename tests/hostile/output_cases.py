"""Tables of hostile outputs and switches: where a result must not go, and what no run can be asked for.

`case.py` says what a case is; this is the part about places that are written and about the commands
that run other commands.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from case import NUMBERS, OTHER_JSON, Case, written

FOLDERS = ("svd", "gptq", "quip", "aqlm", "moments", "obey", "compress", "compare", "speed", "versus")
FILES = ("plan", "perplexity", "questions", "predicted", "divergence", "ranks", "mix")
BESIDE_A_PLAN = ("obey", "ranks")  # whose copy is the folder of a plan, beside which anything may be written
PLACES = {
    "the model": "{model}",
    "the model by dots": "{model}/../model",
    "a folder in the model": "{model}/out",
    "the config": "{model}/config.json",
    "below a file": "{model}/config.json/out",
    "a folder of others": "{model}/../foreign",
    "a file of others": "{model}/../foreign/figures.json",
    "below a file of others": "{model}/../foreign/notes.txt/out",
    "a link": "{model}/../link",
    "a link in a circle": "{model}/../circle",
    "a pipe": "{model}/../pipe",
    "the root": "/",
    "a device": "/dev/null",
    "no writable place": "/proc/out",
    "long name": "x" * 300,
    "long path": "/" + "x/" * 3000 + "x",
    "null byte": "a\0b",
    "empty": "",
    "the present folder": ".",
}
REPORTS = ("compare", "speed")  # which add theirs to a folder and leave the rest
ADDING = ("a folder of others", "the present folder", "empty")
UNTRIED = ("no writable place", "below a file of others")  # by a command that only announces
NOT_OF_SPEED = (*ADDING, "the root")  # where it would be measured for nothing
SWITCHES = ("--models", "--backends", "--bits", "--seeds", "--samples", "--questions", "--epochs", "--work")
TYPED = {"nothing": b"", "no text": b"\xff\xfe\n", "zeros": bytes(5000), "a long line": b"a" * 10**6}
ASKED = ("", " ", "\udcff", "x" * 100_000)
OF_SPEED = (
    ("--codebooks", "thesis"),
    ("--codebooks", ""),
    ("--generate", "nan"),
    ("--generate", "0"),
    ("--ggml", "/nowhere"),
    ("--ggml", "{text}"),
    ("--ggml", "{model}/../pipe"),
    ("--device", "thesis"),
)
OF_COMPRESS = (
    ("--", "--no-such-flag"),
    ("--", "--bits", "nan"),
    ("--", "--output", "{model}"),
    ("--ft-epochs", "1"),
    ("--costs", "{model}"),
    ("--costs", "{model}/../foreign"),
    ("--costs", "{dir}/out"),
    ("--moments", "{model}"),
    ("--moments", "{model}/../foreign"),
    ("--format", "thesis"),
    ("--format", "codebook=x"),
    ("--format", "group_size=0"),
    ("--token-weights", "thesis"),
    ("--token-weights", "none+none"),
    ("--token-weights", "gradient-norm"),
)
TENFOLD = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))])
RECIPES = {
    "lists of lists": TENFOLD.encode(),
    "lists of lists for a flag": ("format:\n- " + TENFOLD.replace("\n", "\n- ")).encode(),
    "a list of itself": b"format: &a [*a]",
    "deep": b"format: " + b"[" * 30_000 + b"]" * 30_000,
    "long hexadecimal number": b"bits: 0x" + b"F" * 20_000,
    "long number": b"bits: " + b"9" * 20_000,
    "an object of Python's": b"bits: !!python/object/apply:os.system ['touch executed']",
    "a date": b"bits: 2024-01-01",
    "nan": b"bits: .nan",
    "a model elsewhere": b"model: /nowhere",
    "an output": b"output: /tmp",
    "zeros": bytes(1000),
    "not UTF-8": b"bits: \xff",
    "large": b"#" * 10**6,
}
"""Recipes in YAML that are none, or ask for what a recipe cannot ask for."""


def foreign(folder: Path) -> None:
    """Puts things beside the model that are nobody's but the user's."""
    (folder.parent / "foreign").mkdir()
    (folder.parent / "foreign/figures.json").write_text('{"mine": 1}')
    (folder.parent / "foreign/notes.txt").write_text("not to be lost")
    (folder.parent / "link").symlink_to(folder)
    (folder.parent / "circle").symlink_to("circle")
    os.mkfifo(folder.parent / "pipe")


def output_cases() -> Iterator[Case]:
    """Outputs that are inputs, that others made, or that nothing can be written to."""
    for command in (*FOLDERS, *FILES):
        base = "plan" if command in BESIDE_A_PLAN else "llava" if command == "questions" else "llama"
        for label, place in PLACES.items():
            if command == "speed" and ("{model}" in place or label in NOT_OF_SPEED):
                continue  # it reads no model
            if command in BESIDE_A_PLAN and place.startswith("{model}/") and ".." not in place:
                continue
            fine = label in (ADDING if command in REPORTS else UNTRIED if command == "compress" else ())
            name = f"{command} into {label}"
            yield Case("outputs", name, command, base, foreign, ("--output", place), refuse=not fine)
    for command in ("gptq", "obey", "plan"):
        for flag in ("--moments", "--costs") if command == "plan" else ("--moments",):
            base = "plan" if command == "obey" else "llama"
            flags = (flag, "{moments}", "--output", "{moments}/out.json")
            yield Case("outputs", f"{command} into its {flag}", command, base, foreign, flags)
    for command in ("gptq", "svd", "moments", "plan", "compress"):
        for name in ("out",) if command == "plan" else ("out.partial", "out"):  # a plan is a file
            yield Case("outputs", f"{command} beside a foreign {name}", command, "llama", beside(name))


def beside(name: str) -> Callable[[Path], None]:
    """A folder `name` of others where a run wants to work."""

    def damage(folder: Path) -> None:
        place = folder.parent / name
        place.mkdir()
        (place / "notes.txt").write_text("not to be lost")
        (place / "config.json").write_text("{}")

    return damage


def switch_cases() -> Iterator[Case]:
    """What the commands that run others, and those that converse, are asked for."""

    def switch(command: str, flags: tuple[str, ...], refuse: bool = True, **more: Any) -> Case:
        name = f"{command} {' '.join(flags)[:50]!r}"
        return Case("switches", name, command, "llama", foreign, flags, refuse, **more)

    for flag in SWITCHES:
        for value in (*NUMBERS, "../x", "x" * 300, "a\0b"):
            # What is right about that flag is refused for the model.
            yield switch("versus", (f"{flag}={value}", *(() if flag == "--models" else ("--models", "nowhere"))))
    for value in NUMBERS:
        yield switch("chat", (f"--max-new-tokens={value}",), value not in ("1_0",))
    for label, typed in TYPED.items():
        yield Case("switches", f"chat is told {label}", "chat", "llama", foreign, (), False, typed)
    for value in ASKED:
        yield switch("chat", ("--question", value), False)
    for flags in OF_SPEED:
        yield switch("speed", flags)
    for flags in OF_COMPRESS:
        yield switch("compress", flags)
    for label, data in RECIPES.items():
        damage, flags = written("recipe.yaml", data), ("--recipe", "{model}/recipe.yaml")
        fine = label in ("a model elsewhere", "an output")  # flags overrule it
        yield Case("switches", f"compress, recipe: {label}", "compress", "llama", damage, flags, not fine)
    for label, data in OTHER_JSON.items():
        damage, flags = written("recipe.json", data), ("--recipe", "{model}/recipe.json")
        fine = label == "object"
        yield Case("switches", f"compress, recipe: JSON, {label}", "compress", "llama", damage, flags, not fine)
