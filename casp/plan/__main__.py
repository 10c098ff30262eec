"""The plan's stage: `python -m casp.plan --model ... --backend ... --bits 2.1`, from moments to plan.json."""

import argparse
from pathlib import Path

from casp.backend import load_backend
from casp.cli import (
    Budget,
    Compute,
    Parser,
    add_device_arguments,
    base_model,
    compute_of,
    model_folder,
    run_main,
    union,
)
from casp.errors import UserError
from casp.lowrank import LOW_RANK_ROLES
from casp.model.decoder import Decoder
from casp.moments.store import Moments
from casp.numbers import seed
from casp.plan.allocate import ALLOCATIONS, least_cost
from casp.plan.costs import Pricing
from casp.plan.file import SHAPE, Plan, write_plan
from casp.plan.flags import (
    Goal,
    Prices,
    add_budget_arguments,
    add_pricing_arguments,
    goal_of,
    prices_of,
    wanted_entries,
)
from casp.plan.least import check_least
from casp.plan.measure import STAGE, CostsFolder, measure, read_costs, with_low_rank
from casp.plan.table import describe
from casp.ranks import here
from casp.run.digest import content_hash
from casp.run.outputs import check_file


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


def open_costs(prices: Prices, compute: Compute, decoder: Decoder) -> Path:
    """The finished folder of priced options that is asked for, priced now where it does not exist."""
    moments = Moments(prices.moments_folder())
    moments.check(content_hash(decoder.folder), decoder, prices.token_weights)
    if not moments.has_gradients:
        raise UserError(f"{moments.folder} was collected without gradients, which costs are read from; collect again.")
    pricing = Pricing(
        load_backend(prices.backend),
        weighting=prices.token_weights,
        tuned=prices.tuned,
        wanted=wanted_entries(prices.format),
        seed=compute.seed,
    )
    record = union(pricing.record(), compute.record(), {"moments": moments.identity(decoder)})
    base, inputs = base_model(decoder.folder, prices.model), [moments.folder]
    work = CostsFolder(prices.costs_folder(), decoder, STAGE, base, record, "", inputs, here())
    if not work.done:
        measure(decoder, work, moments, pricing, compute.device, compute.dtype)
        print(f"priced all options {work.account()}: {work.output}")
    return work.output


def make_plan(prices: Prices, goal: Goal, compute: Compute, output: Path | None) -> Path:
    """Price where that is not done, allocate, write and print the plan; returns its file."""
    decoder = Decoder(model_folder(prices.model))
    budget = goal.budget(decoder)
    if output is not None:
        check_file(output, [SHAPE], [decoder.folder, prices.moments_folder()])
    check_least(goal, prices, decoder, budget.bytes)
    costs = open_costs(prices, compute.of(decoder.dtype), decoder)
    return Path(here().told(lambda: str(allocate(prices, goal, budget, decoder, costs, output))))


def allocate(prices: Prices, goal: Goal, budget: Budget, decoder: Decoder, costs: Path, output: Path | None) -> Path:
    """Choose among the options that the folder `costs` holds, write and print the plan; returns its file."""
    priced = read_costs(costs, decoder, load_backend(prices.backend))
    linears = with_low_rank(priced, LOW_RANK_ROLES if goal.low_rank else ())
    options = ALLOCATIONS[goal.allocation](linears, budget.bytes)
    at_least = least_cost(linears, budget.bytes)
    record = union(goal.record(), budget.record(), {"at_least": at_least})
    plan = Plan(content_hash(decoder.folder), prices.backend, decoder.original_weights(), options, record)
    print(describe(plan, linears, at_least))
    kind = goal.allocation + ("" if goal.low_rank else "-full-rank")
    file = output or costs / f"plan-{kind}-{8 * budget.bytes / decoder.original_weights():.3f}.json"
    write_plan(file, plan)
    print(f"wrote {file}; edit it if you like, and give it to the quantizing stage as --plan {file}")
    return file


def main(argv: list[str] | None = None) -> None:
    """Make one plan."""
    args = parser().parse_args(argv)
    make_plan(prices_of(args), goal_of(args), compute_of(args), args.output)


if __name__ == "__main__":
    run_main(main, shared=True)
