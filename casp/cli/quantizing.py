"""What the stages of all backends are asked: their flags, and the frozen options that these become."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from casp.cli.flags import calibration_of, compute_of
from casp.cli.options import Calibration, Compute
from casp.errors import UserError
from casp.finetune.in_block import Training
from casp.moments.find import ON_THE_WAY, add_moments_argument, add_token_weights_argument
from casp.numbers import real, whole

MOST_EPOCHS, MOST_RATE = 10_000, 1.0  # a rate of 1 moves every number by its own size in a step
PARTS = 4
BLOCK_RATE, END_TO_END_RATE = 1e-3, 3e-4


@dataclass(frozen=True)
class FineTuning:
    """What is fine-tuned after or while quantizing: None where a part is left out."""

    block: Training | None = None
    end_to_end: Training | None = None
    checkpointing: bool = True

    @property
    def wanted(self) -> bool:
        """Whether anything is to be tuned."""
        return self.block is not None or self.end_to_end is not None

    @property
    def batches(self) -> int:
        """How many batches make a step; 1 where nothing is tuned."""
        return max((training.batches for training in (self.block, self.end_to_end) if training), default=1)

    @property
    def words(self) -> list[str]:
        """What an output's name says of it: "ft" in the block, "e2e" end to end."""
        parts = {"ft": self.block, "e2e": self.end_to_end}
        return [name for name, training in parts.items() if training is not None]

    def record(self) -> dict[str, Any]:
        """All of it, JSON-able; nothing where nothing is tuned."""
        return {"fine_tuning": asdict(self)} if self.wanted else {}


@dataclass(frozen=True)
class Quantizing:
    """What a quantizing stage is asked to do, besides its backend's formats and search.

    model: as on the command line; output: None for its usual place; from_original: pass over the SVD stage's output;
    bits_budget (an original weight), target_bytes_of (a checkpoint): at most one of them, as the budget; plan: of ranks
    and formats, a file; moments: collected before, a folder, None to find them; token_weights: None for the best that
    there are; true_sequential: see `casp.rounding.Method`; given: the flags, and carry: a file instead of them, for the
    recipe in the checkpoint (`casp.run.recipe`), which decides no bytes besides its own; allow_partial: see
    `Decoder.require_share`.
    """

    model: str
    output: Path | None
    from_original: bool
    calibration: Calibration
    compute: Compute
    bits_budget: float | None
    target_bytes_of: Path | None
    plan: Path | None
    moments: Path | None
    token_weights: str | None
    true_sequential: bool
    tuning: FineTuning = FineTuning()
    given: Mapping[str, Any] = field(default_factory=dict)
    carry: Path | None = None
    allow_partial: bool = False

    @property
    def has_budget(self) -> bool:
        """Whether more bytes than the format's are asked for."""
        return self.bits_budget is not None or self.target_bytes_of is not None

    def check_export(self) -> None:
        """UserError where matrices may end in several formats, of which a plain checkpoint of others holds one."""
        if self.has_budget or self.plan is not None:
            raise UserError("--export writes one format for all layers; leave it, or the byte budget or plan, out.")


def add_quantizing_arguments(parser: argparse.ArgumentParser, on_the_way: str = ON_THE_WAY) -> None:
    """Flags of every quantizing stage, besides the common ones; on_the_way: see `quantize_stage`."""
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--bits-budget",
        type=real(0, 64),
        metavar="BPW",
        help="bits per original weight, all overheads counted, that must not be exceeded; what --bits leaves goes to "
        "more bits (default: for a model with low-rank layers, what --bits would take without them)",
    )
    budget.add_argument(
        "--target-bytes-of", type=Path, metavar="DIR", help="the same, as the size of the linears of checkpoint DIR"
    )
    parser.add_argument(
        "--from-original",
        action="store_true",
        help="start from --model itself even where the SVD stage has an output for it (default: off)",
    )
    parser.add_argument(
        "--true-sequential",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="each matrix sees what the quantized earlier ones of its block produce: one pass over the calibration "
        "data per group of matrices instead of one per block (default: on)",
    )
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="obey this plan of ranks and formats, made by plan.sh and edited if you like, on --model itself; it needs "
        "moments collected before (default: one format for all, --bits)",
    )
    parser.add_argument(
        "--carry",
        type=Path,
        metavar="FILE",
        help="recipe that the checkpoint is to carry, as compress.sh writes it (default: the flags of this command)",
    )
    add_moments_argument(parser)
    add_token_weights_argument(parser, on_the_way)


def add_damping_argument(parser: argparse.ArgumentParser) -> None:
    """--damping, of every backend that factors a Hessian."""
    parser.add_argument(
        "--damping",
        type=real(0, 1),
        default=0.01,
        help="added to the Hessian's diagonal, as a share of its mean (default: %(default)s)",
    )


def add_tuning_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of a stage whose backend can be fine-tuned."""
    parser.add_argument(
        "--ft-epochs",
        type=whole(0, MOST_EPOCHS),
        default=2,
        help="passes over the calibration data in each of the two fine-tunings, in the blocks and end to end; 0: none "
        "of them (default: %(default)s)",
    )
    parser.add_argument(
        "--block-epochs", type=whole(0, MOST_EPOCHS), help="the same within the blocks alone (default: --ft-epochs)"
    )
    parser.add_argument(
        "--e2e-epochs", type=whole(0, MOST_EPOCHS), help="the same end to end alone (default: --ft-epochs)"
    )
    parser.add_argument(
        "--block-lr",
        type=real(0, MOST_RATE),
        default=BLOCK_RATE,
        help="learning rate within the blocks, relative to each tensor's root mean square (default: %(default)s)",
    )
    parser.add_argument(
        "--e2e-lr",
        type=real(0, MOST_RATE),
        default=END_TO_END_RATE,
        help="learning rate end to end, relative in the same way (default: %(default)s)",
    )
    parser.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end to end, compute each block a second time for its gradient: one block's activations and dense "
        "weights in memory instead of all (default: on)",
    )


def parts_of(batch_size: int) -> int:
    """In how many batches a step of so many samples is computed, such that as many ranks can share it: about 4."""
    return batch_size // max(1, batch_size // PARTS)


def fine_tuning_of(args: argparse.Namespace) -> FineTuning:
    """What the flags of `add_tuning_arguments` ask for."""
    parts = []
    for part in ("block", "e2e"):
        epochs, rate = getattr(args, f"{part}_epochs"), getattr(args, f"{part}_lr")
        if epochs is None:
            epochs = args.ft_epochs
        parts.append(Training(epochs, rate, parts_of(args.batch_size)) if epochs else None)
    return FineTuning(*parts, checkpointing=args.gradient_checkpointing)


def quantizing_of(args: argparse.Namespace, tuning: FineTuning = FineTuning()) -> Quantizing:
    """What the common flags and those of `add_quantizing_arguments` ask for."""
    return Quantizing(
        args.model,
        args.output,
        args.from_original,
        calibration_of(args),
        compute_of(args),
        args.bits_budget,
        args.target_bytes_of,
        args.plan,
        args.moments,
        args.token_weights,
        args.true_sequential,
        tuning,
        args.given,
        args.carry,
        args.allow_partial,
    )
