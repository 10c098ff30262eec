"""Quantize and fine-tune: `python -m casp_quip_sharp --model ... --bits 2`."""

import argparse

from casp.cli import Parser, add_common_arguments, run_main
from casp.errors import UserError
from casp.stage import FineTuning, add_quantizing_arguments, add_tuning_arguments, quantize_stage
from casp_quip_sharp.backend import QuipSharp
from casp_quip_sharp.codebooks import STAGES

BLOCK_RATE, END_TO_END_RATE = 1e-3, 3e-4  # relative to a tensor's root mean square


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(
        prog="python -m casp_quip_sharp",
        description="Quantize a model's decoder with QuIP# and fine-tune it. After stage SVD, the bytes that low-rank "
        "layers free buy more bits for the blocks of highest block influence.",
    )
    add_common_arguments(flags, default_model="meta-llama/Llama-2-7b-hf")
    flags.add_argument("--bits", type=int, default=2, help="bits a weight: 1, 2, 3 or 4 (default: %(default)s)")
    flags.add_argument(
        "--damping",
        type=float,
        default=0.01,
        help="added to the Hessian's diagonal, as a share of its mean (default: %(default)s)",
    )
    flags.add_argument(
        "--scale-search",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare scales of each matrix, and of its columns where it is to be fine-tuned, under the weighted loss, "
        "instead of taking the one that is best for Gaussian weights (default: %(default)s)",
    )
    flags.add_argument(
        "--sweeps",
        type=int,
        default=4,
        help="most rounds of coordinate descent after LDLQ, a count; none follows one that gained little "
        "(default: %(default)s)",
    )
    add_tuning_arguments(flags, block_rate=BLOCK_RATE, end_to_end_rate=END_TO_END_RATE)
    add_quantizing_arguments(flags)
    return flags


def check_flags(args: argparse.Namespace) -> None:
    """UserError for numbers outside their range."""
    if not 0 < args.damping < 1:
        raise UserError(f"--damping {args.damping:g} is not between 0 and 1; 0.01 is usual.")
    if args.sweeps < 0:
        raise UserError(f"--sweeps {args.sweeps} is negative; give 0 or more.")


def label(bits: int, tuning: FineTuning) -> str:
    """What the output is filed under: quip-sharp-2bit, and what of it was fine-tuned."""
    parts = {"ft": tuning.block, "e2e": tuning.end_to_end}
    return "-".join([f"quip-sharp-{bits}bit", *(name for name, training in parts.items() if training is not None)])


def main(argv: list[str] | None = None) -> None:
    """Quantize one model."""
    args = parser().parse_args(argv)
    check_flags(args)
    tuning = FineTuning.from_flags(args)
    backend = QuipSharp()
    backend.format(args.bits)
    ladder = [backend.format(bits, tuned=tuning.wanted) for bits in STAGES if bits >= args.bits]
    search = {"damping": args.damping, "search_scale": args.scale_search, "sweeps": args.sweeps}
    quantize_stage(args, backend, ladder, search, label(args.bits, tuning), tuning=tuning)


if __name__ == "__main__":
    run_main(main)
