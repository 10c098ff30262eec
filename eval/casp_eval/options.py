"""Command-line options and output that the evaluation scripts share."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casp.demo import NAMES
from casp.numbers import seed, whole
from casp.ranks import here
from casp.reading.files import is_there
from casp.run.files import write_atomically
from casp.run.outputs import check_file, require_writable

MOST_NEW_TOKENS = 1 << 16
MOST_CHARACTERS = 20_000  # of a question: more than any built-in model reads, an answer within seconds of computing


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """--model of a script about one checkpoint."""
    parser.add_argument("--model", required=True, help=f"hub id, folder, or built-in name ({', '.join(NAMES)})")


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """--output of a script that measures one figure."""
    parser.add_argument("--output", type=Path, help="a file for the JSON (default: print it)")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """How much text is scored: --windows and --sequence-length."""
    parser.add_argument(
        "--windows", type=whole(0), default=64, help="windows of text scored, 0 = all (default: %(default)s)"
    )
    parser.add_argument(
        "--sequence-length", type=whole(2), default=512, help="tokens in a window (default: %(default)s)"
    )


def add_question_arguments(parser: argparse.ArgumentParser, file_from: str) -> None:
    """Which questions are asked and how long answers may be; `file_from`: the flag that takes a .jsonl of questions."""
    parser.add_argument(
        "--questions", type=whole(0), default=300, help="questions asked, 0 = all (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1, MOST_NEW_TOKENS),
        default=8,
        help="longest answer, in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        help=f"which questions are drawn from a .jsonl ({file_from}) longer than --questions (default: %(default)s)",
    )


def add_batch_argument(parser: argparse.ArgumentParser) -> None:
    """--batch-size."""
    parser.add_argument(
        "--batch-size", type=whole(1), default=8, help="windows or questions at a time (default: %(default)s)"
    )


@dataclass(frozen=True)
class Scoring:
    """How checkpoints are scored: device and dtype in the words of their flags, windows (0 = all) of `sequence_length`
    tokens of a text, how many windows or questions at a time, and the longest answer in tokens.
    """

    device: str
    dtype: str
    windows: int
    sequence_length: int
    batch_size: int
    max_new_tokens: int


def check_output(output: Path | None, *given: str | Path | None) -> None:
    """UserError, before anything is measured, where --output is an input (`given`) or not a file of such figures.

    Of several ranks the first alone looks, which writes it: what one tries to write is in the way of another.
    """
    if output is not None and here().first:
        inputs = [Path(name) for name in given if name and is_there(Path(name))]
        shapes = [{"model", "dataset", "perplexity"}, {"model", "results"}, {"model", "original", "divergence"}]
        check_file(output, shapes, inputs)
        require_writable(output)


def write_figure(figure: dict[str, Any], output: Path | None) -> None:
    """Print a result as JSON, or write it to a file."""
    text = json.dumps(figure, indent=2)
    if output is None:
        print(text)
        return
    require_writable(output)
    write_atomically(output, (text + "\n").encode())
