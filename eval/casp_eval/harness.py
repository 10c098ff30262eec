"""What our two doors to other people's benchmarks, lm-eval and lmms-eval, have in common: flags and errors."""

import argparse
import importlib.util
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from casp.errors import UserError, in_brief
from casp.numbers import whole
from casp_eval.options import add_model_argument, add_output_argument


def add_harness_arguments(parser: argparse.ArgumentParser, harness: str) -> None:
    """--model, --output and which tasks of `harness` (its name in texts) are run on how many documents."""
    add_model_argument(parser)
    add_output_argument(parser)
    parser.add_argument(
        "--tasks",
        type=lambda words: [word for word in words.split(",") if word],
        required=True,
        help=f"names of {harness}'s tasks or groups, with commas between",
    )
    parser.add_argument("--include-path", type=Path, help="folder with task files of your own, YAML (default: none)")
    parser.add_argument("--limit", type=whole(1), help="documents per task, a count (default: all)")
    parser.add_argument(
        "--num-fewshot", type=whole(0), help="examples before each question, a count (default: the task's own)"
    )
    parser.add_argument(
        "--batch-size", type=whole(1), default=8, help="requests at a time, a count (default: %(default)s)"
    )


def check_harness(tasks: list[str], include: Path | None, module: str, extra: str) -> None:
    """UserError where `module` is not installed, no task is named, or --include-path is no folder."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{extra} is not installed; install the extra: pip install -r requirements-{extra}.txt.")
    if not tasks:
        raise UserError("--tasks names no task; give at least one.")
    if include is not None and not include.is_dir():
        raise UserError(f"--include-path {include} is no folder; give the folder of your task files.")


def check_tasks(tasks: list[str], known: Collection[str], include: Path | None) -> None:
    """UserError that names the first of `tasks` that is not `known`."""
    for task in tasks:
        if task not in known:
            where = f" and {include} defines none of that name" if include is not None else ""
            raise UserError(
                f"task {task!r} is unknown{where}; check the spelling, or give the folder of your own task files with "
                "--include-path."
            )


@contextmanager
def named_failures(tasks: list[str]) -> Iterator[None]:
    """Inside the block, data that cannot be had is a UserError; the harnesses fetch it in many ways, from the hub."""
    try:
        yield
    except AssertionError as error:  # lmms-eval: what an interface or a task's settings do not allow
        raise UserError(f"the tasks {', '.join(tasks)} cannot be run so ({in_brief(error)}); change flags.") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"the tasks {', '.join(tasks)} cannot be run ({in_brief(error)}); check the connection to the hub, or "
            "the task's own file."
        ) from error
