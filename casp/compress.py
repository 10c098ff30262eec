"""The whole job: `python -m casp.compress --model ... --bits 2.1 --backend ... --output DIR`.

Runs the stages one after the other as their scripts do, each a process of its own, so that the memory of one is
free for the next: moments, the plan, low rank and quantizing (with fine-tuning where asked for), comparison with the
original where asked for. Each resumes where it stopped and passes over what is finished; so does the same command as a
whole.
"""

import argparse
import importlib
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import torch

from casp.backend import ENTRY_POINT_GROUP, load_backend
from casp.cli import Parser, add_common_arguments, default_output, model_folder, pick_device, run_main
from casp.cli.quantizing import MOST_EPOCHS
from casp.data import sources
from casp.digest import content_hash
from casp.errors import UserError
from casp.folder import check_places
from casp.models import Decoder
from casp.numbers import whole
from casp.outputs import check_file
from casp.plan.budget import other_bytes
from casp.plan.file import SHAPE, read_plan
from casp.plan.flags import add_budget_arguments, add_pricing_arguments, goal_of

EVALUATION = "casp_eval.compare"
TOKENS_EVALUATED = 50_000
TOKENS_A_CHAT = 100  # where chats are the calibration data: only estimates of time ask
_MATRIX = 1024


@dataclass(frozen=True)
class Step:
    """One stage: what it is called, its command, the file or folder that it leaves, and how long it may take."""

    name: str
    command: list[str]
    outcome: Path
    seconds: float


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(
        prog="compress.sh",
        description="Compress a model to a number of bits a weight or to a size: moments, plan, low rank, quantizing.",
    )
    add_common_arguments(flags, default_model="demo-llava")
    add_pricing_arguments(flags)
    add_budget_arguments(flags)
    flags.add_argument("--plan", type=Path, metavar="FILE", help="obey this plan (default: make one)")
    flags.add_argument(
        "--ft-epochs",
        type=whole(0, MOST_EPOCHS),
        default=0,
        help="passes over the calibration data in each of the fine-tunings that the backend has (default: %(default)s)",
    )
    flags.add_argument(
        "--evaluate",
        action="store_true",
        help="afterwards compare the outcome with the original as compare.sh does, into OUTPUT-report (default: off)",
    )
    flags.add_argument("--dry-run", action="store_true", help="say what would be done, and end (default: off)")
    flags.add_argument(
        "quantizing", nargs="*", metavar="-- FLAG", help="more flags for the quantizing stage, after a --"
    )
    return flags


def package_of(backend: str) -> str:
    """The Python package that offers `backend`, whose `python -m` is its quantizing stage."""
    (found,) = entry_points(group=ENTRY_POINT_GROUP, name=backend)
    return found.module.partition(".")[0]


def tunes(package: str) -> bool:
    """Whether the quantizing stage of `package` has fine-tunings."""
    flags, _ = parser_of(package).parse_known_args([])
    return hasattr(flags, "ft_epochs")


def parser_of(package: str) -> argparse.ArgumentParser:
    """The command line of a stage."""
    return importlib.import_module(f"{package}.__main__").parser()


def speed(device: torch.device) -> float:
    """Multiply-adds a second that matrix products reach here, times two."""
    a = torch.randn(_MATRIX, _MATRIX, device=device)
    (a @ a).sum().item()
    began = time.perf_counter()
    (a @ a).sum().item()
    return 2 * _MATRIX**3 / max(time.perf_counter() - began, 1e-6)


def steps(args: argparse.Namespace, decoder: Decoder, output: Path, budget: int) -> list[Step]:
    """The stages in their order, with estimates good to a factor of two or three."""
    backend, package = args.backend, package_of(args.backend)
    if args.ft_epochs and not tunes(package):
        raise UserError(f"backend {backend!r} has no fine-tuning; leave --ft-epochs out.")
    python = [sys.executable, "-m"]
    run = ["--model", args.model, "--device", args.device, "--dtype", args.dtype, "--seed", str(args.seed)]
    partial = ["--allow-partial"] if args.allow_partial else []
    data = ["--dataset", args.dataset, "--samples", str(args.samples), "--batch-size", str(args.batch_size)]
    data += ["--sequence-length", str(args.sequence_length)]
    data += ["--frames", str(args.frames), "--visual-tokens", str(args.visual_tokens)]
    moments = args.moments or default_output(args.model, "moments")
    tuned = bool(args.ft_epochs)
    plan = plan_file(args, output)
    weights = decoder.original_weights()
    chats = sources.share_of_chats(args.dataset) if decoder.is_multimodal else 0.0
    tokens = args.samples * (chats * TOKENS_A_CHAT + (1 - chats) * args.sequence_length)
    rate = speed(pick_device(args.device))
    widths = sum(
        module.in_features**2 + module.out_features**2
        for index in range(len(decoder.blocks))
        for module in map(decoder.block(index).get_submodule, decoder.linears(index).values())
    )
    walk = 2 * tokens * weights / rate
    moment_seconds = 4 * walk + 2 * tokens * widths / rate
    rounding = 400 * weights * (widths / weights) ** 0.5 / rate + weights / 1e6  # factors, search
    of_plan = ["--backend", backend, "--moments", str(moments), "--token-weights", args.token_weights]
    of_plan += ["--format", *args.format] if args.format else []
    of_plan += ["--tuned"] if tuned or args.tuned else []
    of_plan += ["--allocation", args.allocation, "--low-rank" if args.low_rank else "--no-low-rank"]
    command = [*python, "casp.moments", *run, *partial, *data, "--from-original", "--output", str(moments)]
    found = [Step("moments", command, moments, moment_seconds)]
    if args.plan is None:
        size = ["--size", f"{budget}B"]
        command = [*python, "casp.plan", *run, *of_plan, *size, "--output", str(plan)]
        command += [] if args.costs is None else ["--costs", str(args.costs)]
        found.append(Step("plan", command, plan, rounding))
    command = [
        *python,
        package,
        *run,
        *partial,
        *data,
        "--plan",
        str(plan),
        "--moments",
        str(moments),
        "--output",
        str(output),
    ]
    command += ["--token-weights", args.token_weights, "--from-original"]
    command += ["--ft-epochs", str(args.ft_epochs)] if tunes(package) else []
    found.append(Step("quantize", [*command, *args.quantizing], output, rounding + 12 * args.ft_epochs * walk))
    if args.evaluate:
        report = output.with_name(output.name + "-report")
        command = [*python, EVALUATION, args.model, str(output), "--device", args.device, "--dtype", args.dtype]
        command += ["--output", str(report), "--update-cards"]
        found.append(Step("evaluate", command, report / "report.json", 4 * TOKENS_EVALUATED * weights / rate))
    return found


def check(args: argparse.Namespace, folder: Path, output: Path) -> None:
    """UserError, before the first stage runs for hours, where a later one would not write where it is told to."""
    moments = args.moments or default_output(args.model, "moments")
    inputs = [folder, *sources.files(args.dataset), *([args.plan] if args.plan else [])]
    check_places(moments, inputs)
    check_places(output, [*inputs, moments])
    if args.plan is None:
        check_file(plan_file(args, output), [SHAPE], [*inputs, moments])
    places = {"output": output, "model": args.model, "moments": moments, "plan": plan_file(args, output)}
    given = [f"--{name}={place}" for name, place in places.items()]
    wanted = parser_of(package_of(args.backend)).parse_args([*given, *args.quantizing])
    if any(getattr(wanted, name) != place for name, place in places.items()):
        raise UserError("--output, --model, --moments and --plan are for all stages; give them before the --.")


def plan_file(args: argparse.Namespace, output: Path) -> Path:
    """The plan that is obeyed: --plan, else the one that is made, beside the output."""
    return args.plan or output.with_name(output.name + "-plan.json")


def duration(seconds: float) -> str:
    """A length of time in words."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def announce(todo: list[Step], decoder: Decoder, budget: int, args: argparse.Namespace) -> None:
    """Print what will be done, with sizes and times."""
    weights, other = decoder.original_weights(), other_bytes(decoder)
    linears = sum(decoder.shards.entries[name].bytes for name in decoder.shards.entries) - other
    print(
        f"compressing {args.model} with {args.backend}: {weights / 1e6:.1f} M weights in {len(decoder.blocks)} "
        f"blocks from {linears / 1e6:.1f} MB to at most {budget / 1e6:.1f} MB ({8 * budget / weights:.3f} bits a "
        f"weight); with the {other / 1e6:.1f} MB that stay as they are, a checkpoint of {(budget + other) / 1e6:.1f} MB"
    )
    for number, step in enumerate(todo, 1):
        state = "done already" if step.outcome.exists() else f"about {duration(step.seconds)}"
        print(f"  {number} {step.name}: {step.outcome} ({state})")


def main(arguments: list[str] | None = None) -> None:
    """Announce the stages and run them."""
    args = parser().parse_args(arguments)
    backend = load_backend(args.backend)  # a misspelt one is told before anything is computed, and so is a bad plan
    decoder = Decoder.open(model_folder(args.model))
    if args.plan is None:
        budget = goal_of(args).budget(decoder).bytes
    else:
        budget = read_plan(args.plan, decoder, content_hash(decoder.folder), backend).bytes
    name = f"casp-{args.backend}-{8 * budget / decoder.original_weights():.3g}bit" + ("-ft" if args.ft_epochs else "")
    output = args.output or default_output(args.model, name)
    if output.name in ("", ".."):  # said by dots alone
        output = Path(os.path.abspath(output))
    check(args, decoder.folder, output)
    todo = steps(args, decoder, output, budget)
    announce(todo, decoder, budget, args)
    if args.dry_run:
        return
    for number, step in enumerate(todo, 1):
        print(f"\n== {number}/{len(todo)} {step.name}: {shlex.join(step.command[1:])}", flush=True)
        status = subprocess.run(step.command).returncode
        if status:
            raise SystemExit(status)  # the stage has said why


if __name__ == "__main__":
    run_main(main)
