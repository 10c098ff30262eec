"""A recipe: what the flags of a command say, as a mapping; in a file of JSON or YAML, and in every finished checkpoint.

A file is one mapping, `{"model": ..., "backend": "quip-sharp", "bits": 2.1, ...}`, with the flags' names as keys (words
of a name joined by _ or -), or what a checkpoint carries, `casp_recipe.json`: {"recipe": 1, "steps": [mapping, ...]},
one step for each command that the checkpoint came about by, its name under "command".
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from casp.errors import UserError
from casp.reading.documents import read_json
from casp.reading.files import is_there, read_bytes

RECIPE_FILE = "casp_recipe.json"
VERSION = 1
COMMAND = "command"
_NO_SETTINGS = {"help", "recipe", "carry", "output", "dry_run"}
MOST_BYTES = 1 << 16
MOST_DEPTH = 16
MOST_BITS = 1024  # of a whole number: Python refuses to spell out the longest


def flags(settings: Mapping[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """`settings`, a value for each flag's name, as the arguments of `parser`; None leaves a flag out.

    UserError for a name that the parser does not have and for a value that is neither text, number, path, truth nor a
    list of such; whether the value is a good one is for the parser to say.
    """
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    rest = {action.dest for action in parser._actions if action.nargs == "*"} - {*actions}
    found: list[str] = []
    last: list[str] = []
    for name, value in settings.items():
        if name in rest and isinstance(value, list | tuple):
            last = ["--", *_words(name, value)]
            continue
        action = actions.get(str(name).replace("-", "_"))
        if action is None or action.dest in ("help", "recipe"):
            known = ", ".join(sorted({*actions, *rest} - {"help", "recipe"}))
            raise UserError(f"there is no setting {str(name)[:40]!r}; there are {known}.")
        if value is None:
            continue
        flag = action.option_strings[0]
        if isinstance(value, bool):
            if action.nargs != 0:
                raise UserError(f"{name} is {str(value).lower()}, and no switch; give its value.")
            if value:
                found.append(flag)
            elif isinstance(action, argparse.BooleanOptionalAction):
                found.append(action.option_strings[1])
        elif isinstance(value, list | tuple) and action.nargs in ("*", "+"):
            found += [flag, *_words(name, value)]
        elif action.nargs != 0:
            found.append(f"{flag}={_word(name, value)}")
        else:
            raise UserError(f"{name} cannot be {_word(name, value)[:40]}; it is a switch, true or false.")
    return found + last


def _words(name: str, values: Sequence[Any]) -> list[str]:
    return [_word(name, value) for value in values]


def _word(name: str, value: Any) -> str:
    # Nothing that nests is spelled out: a few lines of YAML whose lists name each other fill any memory as text.
    if not isinstance(value, str | int | float | Path) or isinstance(value, bool):
        raise UserError(f"{name} cannot be a {type(value).__name__} here; see --help for what it takes.")
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise UserError(f"{name} cannot be a number of {value.bit_length()} bits; see --help for what it takes.")
    return str(value)


def given(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The settings that `args`, parsed by `parser`, say: the model, and every flag that is not at its default."""
    found: dict[str, Any] = {}
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest in _NO_SETTINGS or value is None or value == []:
            continue
        if action.dest == "model" or value != action.default:
            found[action.dest] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool) else str(value)


def with_recipe(words: Sequence[str], parser: argparse.ArgumentParser, command: str) -> list[str]:
    """The arguments `words` of a command with the settings of the recipe that they name before them."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    look.add_argument("--recipe", type=Path)
    try:
        file = look.parse_known_args(words)[0].recipe
    except argparse.ArgumentError:
        file = None  # the parser of the command says what is wrong
    if file is None:
        return list(words)
    settings = read_recipe(file, command)
    for name in _overruled(words, parser):
        settings = {key: value for key, value in settings.items() if str(key).replace("-", "_") != name}
    found = flags(settings, parser)
    end = found.index("--") if "--" in found else len(found)
    return [*found[:end], *words, *([] if "--" in words else found[end:])]


def _overruled(words: Sequence[str], parser: argparse.ArgumentParser) -> set[str]:
    """The settings that exclude one which `words` give: --size in the place of the recipe's bits."""
    given = {word.partition("=")[0] for word in words}
    found = set()
    for group in parser._mutually_exclusive_groups:
        own = {action.dest for action in group._group_actions if given & {*action.option_strings}}
        found |= {action.dest for action in group._group_actions} - own if own else set()
    return found


class _Plain(yaml.SafeLoader):
    """YAML without references and deep nesting: the one fills any memory from a few lines, the other takes minutes."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a reference")
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise yaml.YAMLError("nested too deeply")
        found = super().compose_node(parent, index)
        self.depth -= 1
        return found


def read_recipe(file: Path, command: str) -> dict[str, Any]:
    """The settings for `command` in a recipe file; UserError for any other file."""
    if file.suffix in (".yaml", ".yml"):
        try:
            found = yaml.load(read_bytes(file, "the recipe", MOST_BYTES), _Plain)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise UserError(
                f"the recipe {file} is no YAML of plain settings; write one a line, as `bits: 2.1`."
            ) from error
    else:
        found = read_json(file, "the recipe", remedy="write it again", most=MOST_BYTES)
    if not isinstance(found, dict):
        raise UserError(f"the recipe {file} is no mapping of settings; write one setting a line, as `bits: 2.1`.")
    if "recipe" in found:
        steps = _steps(found, file)
        found = next((step for step in reversed(steps) if step.get(COMMAND) == command), None)
        if found is None:
            made = ", ".join(str(step.get(COMMAND)) for step in steps)
            raise UserError(f"the recipe {file} has no step of `casp {command}`; it is one of {made}.")
    named = found.get(COMMAND, command)
    if named != command:
        raise UserError(f"the recipe {file} is for `casp {str(named)[:40]}`, not for `casp {command}`.")
    return {key: value for key, value in found.items() if key != COMMAND}


def _steps(found: Mapping[str, Any], file: Path) -> list[dict[str, Any]]:
    steps = found.get("steps")
    if found.get("recipe") != VERSION or not isinstance(steps, list) or not all(isinstance(one, dict) for one in steps):
        raise UserError(f"{file} is no recipe that this casp knows; give a mapping of settings, or update casp.")
    return steps


def earlier_steps(source: Path) -> list[dict[str, Any]]:
    """The steps that the checkpoint in `source` came about by, as far as it says; UserError for a damaged recipe."""
    file = source / RECIPE_FILE
    return _steps(read_json(file, "the recipe", most=MOST_BYTES), file) if is_there(file) else []


def carried(source: Path, step: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint made from the one in `source` by `step` carries: the steps of that one, and this."""
    return {"recipe": VERSION, "steps": [*earlier_steps(source), dict(step)]}


def read_recipe_step(file: Path) -> dict[str, Any]:
    """The last step of a recipe that a checkpoint is to carry."""
    steps = _steps(read_json(file, "the recipe", most=MOST_BYTES), file)
    if not steps:
        raise UserError(f"the recipe {file} has no steps; run compress.sh again, which writes it.")
    return steps[-1]
