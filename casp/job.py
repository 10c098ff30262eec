"""The whole job: `python -m casp.job --model ... --bits 2.1 --backend ... --output DIR`.

Runs the stages one after the other as their scripts do, each a process of its own, so that the memory of one is
free for the next: moments, the plan, low rank and quantizing (with fine-tuning where asked for), comparison with the
original where asked for. Each resumes where it stopped and passes over what is finished; so does the same command as a
whole.
"""

import argparse
import importlib
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path

import torch
from casp_entry.torchrun import PROCESSES, processes

from casp.backend import ENTRY_POINT_GROUP, load_backend
from casp.cli import (
    Calibration,
    Parser,
    add_common_arguments,
    calibration_of,
    default_output,
    model_folder,
    pick_device,
    run_main,
)
from casp.cli.quantizing import MOST_EPOCHS
from casp.data import sources
from casp.errors import UserError
from casp.model.decoder import Decoder
from casp.moments.store import Moments
from casp.moments.weights import USUAL, weighting_parts
from casp.numbers import whole
from casp.plan.budget import other_bytes
from casp.plan.file import SHAPE, read_plan, refuse_edited
from casp.plan.flags import (
    Goal,
    Prices,
    add_budget_arguments,
    add_pricing_arguments,
    goal_of,
    prices_of,
)
from casp.plan.least import check_least
from casp.run.digest import content_hash
from casp.run.files import make_folder, write_json
from casp.run.folder import check_places
from casp.run.outputs import check_file, check_folder, refuse_inputs
from casp.run.recipe import COMMAND, VERSION, with_recipe

NAME, QUANTIZE = "compress", "quantize"
EVALUATION = "casp_eval.compare"
LAUNCHER = "casp_entry.torchrun"
TOKENS_EVALUATED = 50_000
TOKENS_A_CHAT = 100  # where chats are the calibration data: only estimates of time ask
_MATRIX = 1024


@dataclass(frozen=True)
class Step:
    """One stage: what it is called, its command, the file or folder that it leaves, how long it may take, and by which
    flag of this command that outcome is chosen.
    """

    name: str
    command: list[str]
    outcome: Path
    seconds: float
    flag: str = "--output"

    def started(self, count: int) -> list[str]:
        """The command that starts it in so many processes."""
        python, *words = self.command
        return [python, "-m", LAUNCHER, *words] if count > 1 else self.command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(
        prog="compress.sh",
        description="Compress a model to a number of bits a weight or to a size: moments, plan, low rank, quantizing.",
    )
    add_common_arguments(flags, default_model="demo-llava")
    add_pricing_arguments(flags)
    add_budget_arguments(flags)
    flags.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="settings from a file, JSON or YAML, with the names of these flags, or from what a checkpoint carries; "
        "flags given besides overrule it (default: none)",
    )
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


@dataclass(frozen=True)
class Job:
    """What is asked for, all stages together.

    machine: --device and --dtype with their words, which every stage understands for itself; plan: a file to obey, None
    to make one; ft_epochs: passes of both fine-tunings; quantizing: more flags of the quantizing stage;
    allow_partial: see `Decoder.require_share`.
    """

    prices: Prices
    goal: Goal
    calibration: Calibration
    device: torch.device
    machine: tuple[str, ...]
    seed: int
    plan: Path | None
    ft_epochs: int
    evaluate: bool
    quantizing: tuple[str, ...]
    allow_partial: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Job":
        """What the flags ask for."""
        return cls(
            prices_of(args),
            goal_of(args),
            calibration_of(args),
            pick_device(args.device),
            ("--device", args.device, "--dtype", args.dtype),
            args.seed,
            args.plan,
            args.ft_epochs,
            args.evaluate,
            tuple(args.quantizing),
            args.allow_partial,
        )

    def plan_file(self, output: Path) -> Path:
        """The plan that is obeyed: `plan`, else the one that is made, beside the output."""
        return self.plan or output.with_name(output.name + "-plan.json")


def package_of(backend: str) -> str:
    """The Python package that offers `backend`, whose `python -m` is its quantizing stage."""
    (found,) = entry_points(group=ENTRY_POINT_GROUP, name=backend)
    return found.module.partition(".")[0]


def tunes(package: str) -> bool:
    """Whether the quantizing stage of `package` has fine-tunings."""
    flags, _ = parser_of(package).parse_known_args([])
    return hasattr(flags, "ft_epochs")


def recipe_file(output: Path) -> Path:
    """Where the recipe is written, beside OUTPUT, for the quantizing stage to put into the checkpoint."""
    return output.with_name(output.name + "-recipe.json")


def parser_of(package: str) -> argparse.ArgumentParser:
    """The command line of a stage; UserError where the package has none."""
    try:
        stage = importlib.import_module(f"{package}.__main__")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.__main__":
            raise
        raise UserError(
            f"the package {package} offers a backend but no quantizing stage, {package}.__main__ with parser() and "
            "main(): add that module, or call the backend from Python."
        ) from None
    return stage.parser()


def speed(device: torch.device) -> float:
    """Multiply-adds a second that matrix products reach here, times two."""
    a = torch.randn(_MATRIX, _MATRIX, device=device)
    (a @ a).sum().item()
    began = time.perf_counter()
    (a @ a).sum().item()
    return 2 * _MATRIX**3 / max(time.perf_counter() - began, 1e-6)


def steps(job: Job, decoder: Decoder, output: Path, budget: int) -> list[Step]:
    """The stages in their order, with estimates good to a factor of two or three."""
    prices, package = job.prices, package_of(job.prices.backend)
    if job.ft_epochs and not tunes(package):
        raise UserError(f"backend {prices.backend!r} has no fine-tuning; leave --ft-epochs out.")
    python = [sys.executable, "-m"]
    run = ["--model", prices.model, *job.machine, "--seed", str(job.seed)]
    data = [f"--{name.replace('_', '-')}={value}" for name, value in job.calibration.record().items()]
    data += ["--allow-partial"] if job.allow_partial else []
    moments, plan = prices.moments_folder(), job.plan_file(output)
    weights = decoder.original_weights()
    chats = sources.share_of_chats(job.calibration.dataset) if decoder.is_multimodal else 0.0
    tokens = job.calibration.samples * (chats * TOKENS_A_CHAT + (1 - chats) * job.calibration.sequence_length)
    rate = speed(job.device)
    widths = sum(
        module.in_features**2 + module.out_features**2
        for index in range(len(decoder.blocks))
        for module in map(decoder.block(index).get_submodule, decoder.linears(index).values())
    )
    walk = 2 * tokens * weights / rate
    moment_seconds = 4 * walk + 2 * tokens * widths / rate
    rounding = 400 * weights * (widths / weights) ** 0.5 / rate + weights / 1e6  # factors, search
    of_plan = ["--backend", prices.backend, "--moments", str(moments), "--token-weights", prices.token_weights]
    of_plan += ["--format", *prices.format] if prices.format else []
    of_plan += ["--tuned"] if job.ft_epochs or prices.tuned else []
    of_plan += ["--allocation", job.goal.allocation, "--low-rank" if job.goal.low_rank else "--no-low-rank"]
    command = [*python, "casp.moments", *run, *data, "--from-original", "--output", str(moments)]
    unusual = set(weighting_parts(prices.token_weights)) - set(USUAL)
    command += ["--token-weights", *USUAL, *sorted(unusual)] if unusual else []
    found = [Step("moments", command, moments, moment_seconds, "--moments")]
    if job.plan is None:
        size = ["--size", f"{budget}B"]
        command = [*python, "casp.plan", *run, *of_plan, *size, "--output", str(plan)]
        command += [] if prices.costs is None else ["--costs", str(prices.costs)]
        found.append(Step("plan", command, plan, rounding))
    command = [*python, package, *run, *data, "--plan", str(plan), "--moments", str(moments), "--output", str(output)]
    command += ["--token-weights", prices.token_weights, "--from-original", "--carry", str(recipe_file(output))]
    command += ["--ft-epochs", str(job.ft_epochs)] if tunes(package) else []
    found.append(Step(QUANTIZE, [*command, *job.quantizing], output, rounding + 12 * job.ft_epochs * walk))
    if job.evaluate:
        report = report_folder(output)
        command = [*python, EVALUATION, prices.model, str(output), *job.machine]
        command += ["--output", str(report), "--update-cards"]
        found.append(Step("evaluate", command, report / "report.json", 4 * TOKENS_EVALUATED * weights / rate))
    return found


def check(job: Job, decoder: Decoder, output: Path, budget: int) -> None:
    """UserError, before the first stage runs for hours, where a later one would not read or write what it shall."""
    prices = replace(job.prices, tuned=bool(job.ft_epochs or job.prices.tuned))
    moments, costs = prices.moments_folder(), prices.costs_folder()
    inputs = [decoder.folder, *job.calibration.files(), *([job.plan] if job.plan else [])]
    check_places(moments, inputs, "--moments")
    check_places(output, [*inputs, moments])
    if moments.exists() and any(moments.iterdir()):
        Moments(moments).check(content_hash(decoder.folder), decoder, job.prices.token_weights)
    plan = job.plan_file(output)
    if job.plan is None:
        check_least(job.goal, prices, decoder, budget)
        check_places(costs, [*inputs, moments], "--costs")
        refuse_inputs(output, [costs])
        check_file(plan, [SHAPE], [*inputs, moments, costs])
        refuse_edited(plan)
    if job.evaluate:
        importlib.import_module(EVALUATION).check_place(report_folder(output), [*inputs, output])
    places = {"output": output, "model": job.prices.model, "moments": moments, "plan": plan}
    given = [f"--{name}={place}" for name, place in places.items()]
    wanted = parser_of(package_of(job.prices.backend)).parse_args([*given, *job.quantizing])
    if any(getattr(wanted, name, None) for name in ("export", "bits_budget", "target_bytes_of")):
        raise UserError("--export, --bits-budget and --target-bytes-of do not go with a plan of ranks and formats.")
    if any(getattr(wanted, name) != place for name, place in places.items()):
        raise UserError("--output, --model, --moments and --plan are for all stages; give them before the --.")


def report_folder(output: Path) -> Path:
    """Where --evaluate writes its report, beside OUTPUT."""
    return output.with_name(output.name + "-report")


def duration(seconds: float) -> str:
    """A length of time in words."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def announce(todo: list[Step], decoder: Decoder, budget: int, prices: Prices, count: int) -> None:
    """Print what will be done in `count` processes, with sizes and times."""
    weights, other = decoder.original_weights(), other_bytes(decoder)
    linears = sum(decoder.shards.entries[name].bytes for name in decoder.shards.entries) - other
    print(
        f"compressing {prices.model} with {prices.backend}: {weights / 1e6:.1f} M weights in {len(decoder.blocks)} "
        f"blocks from {linears / 1e6:.1f} MB to at most {budget / 1e6:.1f} MB ({8 * budget / weights:.3f} bits a "
        f"weight); with the {other / 1e6:.1f} MB that stay as they are, a checkpoint of {(budget + other) / 1e6:.1f} MB"
    )
    for number, step in enumerate(todo, 1):
        state = f"about {duration(step.seconds / count)}" + (f" in {count} processes" if count > 1 else "")
        if step.outcome.exists():
            state = "made anew from its prices, where these are there" if step.name == "plan" else "done already"
        print(f"  {number} {step.name}: {step.outcome} ({state})")


def todo(args: argparse.Namespace, count: int = 1) -> list[Step]:
    """What `args` ask for, announced; the last step but an evaluation leaves the checkpoint.

    count: of processes that share each stage.
    """
    job = Job.of(args)
    backend_name = job.prices.backend
    backend = load_backend(backend_name)  # a misspelt one is told before anything is computed, and so is a bad plan
    decoder = Decoder(model_folder(job.prices.model))
    if job.plan is None:
        budget = job.goal.budget(decoder).bytes
    else:
        budget = read_plan(job.plan, decoder, content_hash(decoder.folder), backend).bytes
    name = f"casp-{backend_name}-{8 * budget / decoder.original_weights():.3g}bit" + ("-ft" if job.ft_epochs else "")
    output = args.output or default_output(job.prices.model, name)
    if output.name in ("", ".."):  # said by dots alone
        output = Path(os.path.abspath(output))
    check_folder(output)  # the root, which has nothing beside it, least of all a plan and a recipe
    check(job, decoder, output, budget)
    recipe = recipe_file(output)
    check_file(recipe, [{"recipe", "steps"}], [decoder.folder])
    found = steps(job, decoder, output, budget)
    announce(found, decoder, budget, job.prices, count)
    if not args.dry_run:
        try:
            make_folder(output.parent)
            write_json(recipe, {"recipe": VERSION, "steps": [{COMMAND: NAME, **args.given}]})
        except OSError as error:
            raise UserError(f"{recipe} cannot be written ({error.strerror}); choose another --output.") from error
    return found


def run(args: argparse.Namespace) -> Path:
    """All steps in this process, for `casp.compress`; returns the folder of the checkpoint."""
    found = todo(args)
    if not args.dry_run:
        for step in found:
            module = step.command[2]
            is_package = importlib.util.find_spec(module).submodule_search_locations is not None
            importlib.import_module(f"{module}.__main__" if is_package else module).main(step.command[3:])
    return next(step.outcome for step in found if step.name == QUANTIZE)


def main(arguments: list[str] | None = None) -> None:
    """Announce the stages and run them."""
    words = with_recipe(sys.argv[1:] if arguments is None else arguments, parser(), NAME)
    args = parser().parse_args(words)
    count = processes(os.environ.get(PROCESSES) or "1")
    found = todo(args, count)
    if args.dry_run:
        return
    for number, step in enumerate(found, 1):
        print(f"\n== {number}/{len(found)} {step.name}: {shlex.join(step.command[1:])}", flush=True)
        status = subprocess.run(step.started(count)).returncode
        if status:
            if step.flag != "--output":
                print(f"{NAME}: that stage's --output is {step.flag} here", file=sys.stderr)
            raise SystemExit(status)  # the stage has said why


if __name__ == "__main__":
    run_main(main)
