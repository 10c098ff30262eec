"""The plan's stage: `python -m casp.plan --model ... --backend ... --bits 2.1`, from moments to plan.json."""

import argparse
import re
from pathlib import Path

from casp.backend import backend_names, load_backend
from casp.cli import (
    Parser,
    add_device_arguments,
    default_output,
    model_folder,
    pick_device,
    pick_dtype,
    run_main,
)
from casp.digest import content_hash
from casp.errors import UserError
from casp.models import Decoder
from casp.moments.find import stage_name
from casp.moments.store import Moments
from casp.numbers import real, seed
from casp.outputs import check_file
from casp.plan.allocate import ALLOCATIONS
from casp.plan.budget import byte_budget
from casp.plan.costs import Pricing
from casp.plan.file import SHAPE, Plan, write_plan
from casp.plan.measure import STAGE, CostsFolder, measure, read_costs, with_low_rank
from casp.plan.options import LOW_RANK_ROLES
from casp.plan.table import describe
from casp.stage import base_model

DEFAULT_BITS = 2.1


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """--bits or --size, of what, and how it is shared out."""
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--bits",
        type=real(0, 16),
        help=f"bits an original weight, a real number, every overhead counted (default: {DEFAULT_BITS})",
    )
    budget.add_argument("--size", metavar="SIZE", help="the same as a size: 30MB, 1.5GB, 700MiB")
    parser.add_argument(
        "--whole-checkpoint",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="the budget is for all that the checkpoint stores, embeddings and vision tower included, not for the "
        "decoder's linears alone (default: off)",
    )
    parser.add_argument(
        "--allocation",
        choices=ALLOCATIONS,
        default="optimal",
        help="optimal = least predicted damage over ranks and formats, exactly; ranks = the same within the bytes that "
        "uniform gives to W_q and W_k, the rest as there; paper = a quarter of W_q and W_k, bits by the influence of "
        "the block; paper-ranks = the same with bits for all alike; uniform = full rank, as even as formats allow "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--low-rank",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="W_q and W_k may become low-rank; the others always keep full rank: their errors go straight into the "
        "residual stream and cost more than predicted (default: on)",
    )


def add_pricing_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides how options are priced."""
    parser.add_argument("--backend", required=True, help=f"the quantizer: {', '.join(backend_names())}")
    parser.add_argument(
        "--format",
        nargs="*",
        metavar="KEY=VALUE",
        default=[],
        help="which formats, in the backend's words: codebook=trellis for quip-sharp, group_size=64 for gptq (default: "
        "its usual ones)",
    )
    parser.add_argument(
        "--tuned",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="formats that fine-tuning can move (default: off)",
    )
    parser.add_argument(
        "--moments", type=Path, metavar="DIR", help="output of the moments' stage (default: runs/<model>/moments)"
    )
    parser.add_argument(
        "--token-weights",
        default="attention+gradient",
        metavar="WEIGHTS",
        help="of the moments that matrices are rounded under (default: %(default)s)",
    )
    parser.add_argument(
        "--costs",
        type=Path,
        metavar="DIR",
        help="folder of the priced options, made once for all budgets (default: a name told from the model, the "
        "backend and the formats)",
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(
        prog="python -m casp.plan",
        description="Choose rank and format of every linear of a decoder together, by what each costs the model.",
    )
    flags.add_argument("--model", required=True, help="hub id, folder, or built-in name")
    add_pricing_arguments(flags)
    add_budget_arguments(flags)
    add_device_arguments(flags)
    flags.add_argument(
        "--seed", type=seed, default=0, help="seed of everything random, an integer (default: %(default)s)"
    )
    flags.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the plan (default: plan-<allocation>-<bits>.json in the folder of the costs)",
    )
    return flags


def checked_bits(args: argparse.Namespace) -> float | None:
    """--bits, 2.1 where neither it nor --size is given."""
    return DEFAULT_BITS if args.bits is None and args.size is None else args.bits


def wanted_entries(pairs: list[str]) -> dict[str, str | int]:
    """`codebook=trellis` as {"codebook": "trellis"}, numbers as numbers; UserError for what is no pair."""
    found: dict[str, str | int] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise UserError(f"--format {pair} is no pair; write it as codebook=trellis.")
        found[name] = int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else value
    return found


def open_costs(args: argparse.Namespace, decoder: Decoder) -> Path:
    """The finished folder of priced options that the flags ask for, priced now where it does not exist."""
    backend = load_backend(args.backend)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, decoder.dtype)
    moments = Moments(args.moments or default_output(args.model, stage_name(low_rank=False)))
    model = content_hash(decoder.folder)
    moments.check(model, decoder, args.token_weights)
    if not moments.has_gradients:
        raise UserError(f"{moments.folder} was collected without gradients, which costs are read from; collect again.")
    pricing = Pricing(
        backend, weighting=args.token_weights, tuned=args.tuned, wanted=wanted_entries(args.format), seed=args.seed
    )
    record = {**pricing.record(), "moments": moments.identity(decoder)}
    work = CostsFolder(
        costs_folder(args), decoder, STAGE, base_model(decoder.folder, args.model), record, "", [moments.folder]
    )
    if not work.done:
        measure(decoder, work, moments, pricing, device, dtype)
        print(f"priced all options {work.account()}: {work.output}")
    return work.output


def costs_folder(args: argparse.Namespace) -> Path:
    """Where the priced options of these settings lie."""
    if args.costs is not None:
        return args.costs
    parts = [STAGE, args.backend, *(pair.partition("=")[2] for pair in args.format), *(["tuned"] if args.tuned else [])]
    return default_output(args.model, "-".join(parts))


def make_plan(args: argparse.Namespace) -> Path:
    """Price where that is not done, allocate, write and print the plan; returns its file."""
    decoder = Decoder.open(model_folder(args.model))
    budget = byte_budget(decoder, checked_bits(args), args.size, args.whole_checkpoint)
    if args.output is not None:
        moments = args.moments or default_output(args.model, stage_name(low_rank=False))
        check_file(args.output, [SHAPE], [decoder.folder, moments])
    costs = open_costs(args, decoder)
    linears = with_low_rank(read_costs(costs, len(decoder.blocks)), LOW_RANK_ROLES if args.low_rank else ())
    record = {"allocation": args.allocation, "byte_budget": budget, "low_rank": args.low_rank}
    options = ALLOCATIONS[args.allocation](linears, budget)
    plan = Plan(content_hash(decoder.folder), args.backend, decoder.original_weights(), options, record)
    print(describe(plan, linears))
    file = args.output or costs / f"plan-{args.allocation}-{8 * budget / decoder.original_weights():.3f}.json"
    write_plan(file, plan)
    print(f"wrote {file}; edit it if you like, and give it to the quantizing stage as --plan {file}")
    return file


def main(argv: list[str] | None = None) -> None:
    """Make one plan."""
    make_plan(parser().parse_args(argv))


if __name__ == "__main__":
    run_main(main)
