"""The quantize stage: `python -m casp_quip_sharp --model ... --bits 2`."""

import argparse

from casp.cli import Parser, add_common_arguments, run_main
from casp.errors import UserError
from casp.stage import add_quantizing_arguments, quantize_stage
from casp_quip_sharp.backend import QuipSharp
from casp_quip_sharp.codebooks import STAGES


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(
        prog="python -m casp_quip_sharp",
        description="Quantize a model's decoder with QuIP#. After stage SVD, the bytes that low-rank layers free buy "
        "more bits for the blocks of highest block influence.",
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
        help="compare scales for each matrix under the weighted loss, instead of the one that is best for Gaussian "
        "weights (default: %(default)s)",
    )
    flags.add_argument(
        "--sweeps",
        type=int,
        default=2,
        help="rounds of coordinate descent after LDLQ, a count; 0: LDLQ alone (default: %(default)s)",
    )
    add_quantizing_arguments(flags)
    return flags


def check_flags(args: argparse.Namespace) -> None:
    """UserError for numbers outside their range."""
    if not 0 < args.damping < 1:
        raise UserError(f"--damping {args.damping:g} is not between 0 and 1; 0.01 is usual.")
    if args.sweeps < 0:
        raise UserError(f"--sweeps {args.sweeps} is negative; give 0 or more.")


def main(argv: list[str] | None = None) -> None:
    """Quantize one model."""
    args = parser().parse_args(argv)
    check_flags(args)
    backend = QuipSharp()
    format = backend.format(args.bits)
    ladder = [backend.format(bits) for bits in STAGES if bits >= format["bits"]]
    search = {"damping": args.damping, "search_scale": args.scale_search, "sweeps": args.sweeps}
    quantize_stage(args, backend, ladder, search, f"quip-sharp-{args.bits}bit")


if __name__ == "__main__":
    run_main(main)
