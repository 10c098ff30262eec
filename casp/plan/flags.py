"""What a plan is asked for: the flags of its budget and of its prices, and the frozen options that these become."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casp.backend import backend_names
from casp.cli import Budget, default_output
from casp.errors import UserError
from casp.model.decoder import Decoder
from casp.moments.find import stage_name
from casp.numbers import real
from casp.plan.allocate import ALLOCATIONS
from casp.plan.budget import byte_budget
from casp.plan.measure import STAGE

DEFAULT_BITS = 2.1


@dataclass(frozen=True)
class Goal:
    """How much a plan may spend, and how it shares that out.

    bits (an original weight) or size ("30MB"), of the decoder's linears or of the whole checkpoint; allocation: one of
    ALLOCATIONS; low_rank: W_q and W_k may become low-rank.
    """

    bits: float | None
    size: str | None
    whole_checkpoint: bool
    allocation: str
    low_rank: bool

    def budget(self, decoder: Decoder) -> Budget:
        """In bytes; UserError for numbers that make no budget."""
        bits = DEFAULT_BITS if self.bits is None and self.size is None else self.bits
        return Budget(byte_budget(decoder, bits, self.size, self.whole_checkpoint))

    def record(self) -> dict[str, Any]:
        """What a plan keeps of it besides the budget, JSON-able."""
        return {"allocation": self.allocation, "low_rank": self.low_rank}


@dataclass(frozen=True)
class Prices:
    """What options are priced, and where: of a model, in the formats of a backend that `format` narrows down.

    format: words of the backend, "codebook=trellis"; tuned: formats that fine-tuning can move; moments, costs: folders,
    None for their usual places; token_weights: of the moments that matrices are rounded under.
    """

    model: str
    backend: str
    format: tuple[str, ...]
    tuned: bool
    moments: Path | None
    token_weights: str
    costs: Path | None

    def moments_folder(self) -> Path:
        """Where the moments lie that costs are read from."""
        return self.moments or default_output(self.model, stage_name(low_rank=False))

    def costs_folder(self) -> Path:
        """Where the priced options lie, or will."""
        if self.costs is not None:
            return self.costs
        values = [pair.partition("=")[2] for pair in self.format]
        return default_output(self.model, "-".join([STAGE, self.backend, *values, *(["tuned"] if self.tuned else [])]))


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


def goal_of(args: argparse.Namespace) -> Goal:
    """What the flags of `add_budget_arguments` ask for."""
    return Goal(args.bits, args.size, args.whole_checkpoint, args.allocation, args.low_rank)


def prices_of(args: argparse.Namespace) -> Prices:
    """What --model and the flags of `add_pricing_arguments` ask for."""
    return Prices(
        args.model, args.backend, tuple(args.format), args.tuned, args.moments, args.token_weights, args.costs
    )


def wanted_entries(pairs: Sequence[str]) -> dict[str, str | int]:
    """`codebook=trellis` as {"codebook": "trellis"}, numbers as numbers; UserError for what is no pair."""
    found: dict[str, str | int] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise UserError(f"--format {pair} is no pair; write it as codebook=trellis.")
        found[name] = int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else value
    return found
