"""Quantize and fine-tune: `python -m casp_quip_sharp --model ... --bits 2`."""

import argparse
from pathlib import Path

from casp.cli import Parser, add_common_arguments, run_main
from casp.hessians import Hessians, add_weighting_argument
from casp.numbers import real, whole
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
        type=real(0, 1),
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
        type=whole(0, 1000),
        default=4,
        help="most rounds of coordinate descent after LDLQ, a count; none follows one that gained little "
        "(default: %(default)s)",
    )
    flags.add_argument(
        "--hessians",
        type=Path,
        metavar="DIR",
        help="output of the Hessian stage for this model (default: collect them on the way, each from what the blocks "
        "quantized before put out)",
    )
    add_weighting_argument(flags)
    add_tuning_arguments(flags, block_rate=BLOCK_RATE, end_to_end_rate=END_TO_END_RATE)
    add_quantizing_arguments(flags)
    return flags


def label(bits: int, tuning: FineTuning) -> str:
    """What the output is filed under: quip-sharp-2bit, and what of it was fine-tuned."""
    parts = {"ft": tuning.block, "e2e": tuning.end_to_end}
    return "-".join([f"quip-sharp-{bits}bit", *(name for name, training in parts.items() if training is not None)])


def main(argv: list[str] | None = None) -> None:
    """Quantize one model."""
    args = parser().parse_args(argv)
    tuning = FineTuning.from_flags(args)
    backend = QuipSharp()
    backend.format(args.bits)
    ladder = [backend.format(bits, tuned=tuning.wanted) for bits in STAGES if bits >= args.bits]
    search = {"damping": args.damping, "search_scale": args.scale_search, "sweeps": args.sweeps}
    hessians = None if args.hessians is None else Hessians(args.hessians)
    quantize_stage(
        args,
        backend,
        ladder,
        search,
        label(args.bits, tuning),
        tuning=tuning,
        hessians=hessians,
        token_weights=args.token_weights,
    )


if __name__ == "__main__":
    run_main(main)
