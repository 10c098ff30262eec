"""The flags that all stages share, and the options that they become."""

import argparse
from pathlib import Path

import torch

from casp.cli.options import Calibration, Compute
from casp.demo import NAMES
from casp.errors import UserError
from casp.model.modality import Visual
from casp.numbers import count, seed
from casp.ranks import here

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        add_calibration_arguments(parser)


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """What data is looked at, as `calibration_of` reads it."""
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
    add_frames_argument(parser)
    parser.add_argument(
        "--visual-tokens",
        type=count,
        default=Visual.tokens,
        help="the most tokens of pictures and video in a sample; larger ones are scaled down (default: %(default)s)",
    )
    parser.add_argument(
        "--dataset",
        default="demo",
        help="calibration data: rp, c4, wikitext2, ptb (hub), a .txt file, a .jsonl file of texts and of pictures "
        "or a video, question and answer or messages, a built-in set (demo = demo-images:12,demo-registers:1 for a "
        "model of images and text, demo-registers for one of text; others: docs/calibration.md), or several by "
        "shares, as in chats.jsonl:12,demo-registers:1 (default: %(default)s)",
    )


def add_frames_argument(parser: argparse.ArgumentParser) -> None:
    """--frames, of everything that reads videos."""
    parser.add_argument(
        "--frames",
        type=count,
        default=Visual.frames,
        help="frames of a video, evenly spaced in time, a count (default: %(default)s)",
    )


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


def pick_device(name: str) -> torch.device:
    """The torch device that --device asks for; UserError where it cannot be had."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise UserError(f"--device {name} is unknown; use auto, cpu, cuda or cuda:N.") from error
    if device.index is not None and here().size > 1:
        raise UserError(f"--device {name} is one GPU for all {here().size} ranks; give cuda, and each takes its own.")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here; use another or cpu."
        )
    return device


def calibration_of(args: argparse.Namespace) -> Calibration:
    """What the flags of calibration ask for."""
    visual = Visual(args.frames, args.visual_tokens)
    return Calibration(args.dataset, args.samples, args.sequence_length, args.batch_size, visual)


def compute_named(device: str, dtype: str, seed: int = 0) -> Compute:
    """What the words of --device and --dtype stand for; UserError for a device that cannot be had."""
    return Compute(pick_device(device), DTYPES.get(dtype), seed)


def compute_of(args: argparse.Namespace) -> Compute:
    """What --device, --dtype and --seed ask for."""
    return compute_named(args.device, args.dtype, args.seed)
