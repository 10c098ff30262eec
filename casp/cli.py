"""The command line that all stages share: common flags, where a model is found, how an error is told."""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from tqdm import tqdm

from casp.demo import NAMES
from casp.errors import UserError
from casp.modality import Visual
from casp.numbers import count, seed
from casp.reading.files import is_there, require_folder

RUNS = Path("runs")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


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

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the flags and exit with 2."""
        tell(f"error: {message} (see --help).")
        raise SystemExit(2)


def add_common_arguments(parser: argparse.ArgumentParser, default_model: str, calibration: bool = True) -> None:
    """Add the flags that every stage understands; those of calibration only where a stage calibrates."""
    parser.add_argument(
        "--model",
        default=default_model,
        help=f"hub id, folder, or built-in name ({', '.join(NAMES)}) (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="folder to write (default: runs/<model>/<stage>)")
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="work on a model of whose decoder less than 90%% of the weights can be compressed (default: off)",
    )
    add_device_arguments(parser)
    parser.add_argument(
        "--seed", type=seed, default=0, help="seed of everything random, an integer (default: %(default)s)"
    )
    if calibration:
        parser.add_argument(
            "--samples",
            type=count,
            default=128,
            help="calibration samples, a count (default: %(default)s)",
        )
        parser.add_argument(
            "--sequence-length",
            type=count,
            default=512,
            help="tokens per text sample (default: %(default)s)",
        )
        parser.add_argument(
            "--batch-size",
            type=count,
            default=8,
            help="samples run at once, a count (default: %(default)s)",
        )
        add_visual_arguments(parser)
        parser.add_argument(
            "--dataset",
            default="demo",
            help="calibration data: rp, c4, wikitext2, ptb (hub), a .txt file, a .jsonl file with text or image, "
            "question and answer or messages, a built-in set (demo = demo-images for a model of images and text, "
            "demo-speeches for one of text; demo-registers, demo-mixed, ...: see the README), or several by shares, as "
            "in demo-images:4,demo-registers:1 (default: %(default)s)",
        )


def add_visual_arguments(parser: argparse.ArgumentParser) -> None:
    """--frames and --visual-tokens, of everything that calibrates on pictures and videos."""
    add_frames_argument(parser)
    parser.add_argument(
        "--visual-tokens",
        type=count,
        default=Visual.tokens,
        help="the most tokens of pictures and video in a sample; larger ones are scaled down (default: %(default)s)",
    )


def add_frames_argument(parser: argparse.ArgumentParser) -> None:
    """--frames, of everything that reads videos."""
    parser.add_argument(
        "--frames",
        type=count,
        default=Visual.frames,
        help="frames of a video, evenly spaced in time, a count (default: %(default)s)",
    )


def visual_of(args: argparse.Namespace) -> Visual:
    """What the flags of `add_visual_arguments` say."""
    return Visual(args.frames, args.visual_tokens)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype, of everything that computes."""
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto = cuda if there is one)"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="dtype to compute in (default: auto = float32 on a CPU, the checkpoint's own on a GPU)",
    )


def model_name(model: str) -> str:
    """The last part of a hub id or folder: what outputs are filed under."""
    path = Path(model)
    return (
        os.path.basename(os.path.realpath(path)) if model and is_there(path) else model.rstrip("/").rpartition("/")[2]
    )


def default_output(model: str, stage: str) -> Path:
    """runs/<model>/<stage>, below the current folder."""
    return RUNS / model_name(model) / stage


def model_folder(model: str) -> Path:
    """The local folder of `model`: a built-in name is assembled, a folder taken as it is, a hub id downloaded."""
    if model in NAMES:
        from casp.demo.models import build

        return build(model)
    path = Path(model)
    if model and is_there(path):
        require_folder(path, "--model")
        return path
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(
            f"--model {model[:200]} does not exist; give a folder, a hub id (owner/name) or {' or '.join(NAMES)}."
        )
    try:
        return Path(snapshot_download(model, allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"--model {model} is no folder here and could not be fetched from the hub ({type(error).__name__}); check "
            "the spelling and the network, or give a local folder."
        ) from error


def stage_input(model: str, earlier_stage: str, from_original: bool) -> Path:
    """What a stage starts from: the output of `earlier_stage` for the same model if there is one, and says so."""
    earlier = default_output(model, earlier_stage)
    if not from_original and (earlier / "config.json").is_file():
        print(f"starting from {earlier}, the output of stage {earlier_stage} (--from-original starts from {model})")
        return earlier
    return model_folder(model)


def pick_device(name: str) -> torch.device:
    """The torch device that --device asks for; UserError where it cannot be had."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise UserError(f"--device {name} is unknown; use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here; use another or cpu."
        )
    return device


def pick_dtype(name: str, device: torch.device, own: torch.dtype) -> torch.dtype:
    """The dtype to compute in; "auto" is float32 on a CPU, where half precision is slow, else the model's own."""
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if device.type == "cpu" else own


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


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a stage; bad input and a full disk end in one sentence on stderr and exit status 2."""
    logging.getLogger("casp").addHandler(_ABOVE_BARS)
    try:
        main()
    except UserError as error:
        tell(f"error: {error}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        tell("interrupted; the same command resumes.")
        raise SystemExit(130) from None
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not full and not isinstance(error, PermissionError):
            raise
        reason = (
            "the disk is full; free some space" if full else f"no permission ({error.filename}); choose another folder"
        )
        tell(f"error: {reason} and run the same command again: it resumes.")
        raise SystemExit(2) from None
    raise SystemExit(0)
