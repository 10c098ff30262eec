"""The quantize stage: `python -m casp_gptq --model ... --bits 2`."""

import argparse

from casp.cli import Parser, add_common_arguments, run_main
from casp.errors import UserError
from casp.stage import add_quantizing_arguments, quantize_stage
from casp_gptq.backend import GPTQ
from casp_gptq.export import check_exportable, export_gptq
from casp_gptq.grid import BITS

ON_THE_WAY = "none"  # token weights without moments collected before; others have not been measured with GPTQ


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(
        prog="python -m casp_gptq",
        description="Quantize a model's decoder with GPTQ. After stage SVD, the bytes that low-rank layers free buy "
        "more bits for the blocks of highest block influence.",
    )
    add_common_arguments(flags, default_model="meta-llama/Llama-2-7b-hf")
    on_off = argparse.BooleanOptionalAction
    flags.add_argument("--bits", type=int, default=2, help="bits a code: 2, 3, 4 or 8 (default: %(default)s)")
    flags.add_argument(
        "--group-size",
        type=int,
        default=128,
        help="columns that share a scale and a zero; need not divide the width; -1: whole rows (default: %(default)s)",
    )
    flags.add_argument(
        "--symmetric",
        action=on_off,
        default=False,
        help="grid symmetric about zero instead of a zero point for each group (default: %(default)s)",
    )
    flags.add_argument(
        "--act-order",
        action=on_off,
        default=True,
        help="round the columns with the largest inputs first (default: %(default)s)",
    )
    flags.add_argument(
        "--damping",
        type=float,
        default=0.01,
        help="added to the Hessian's diagonal, as a share of its mean (default: %(default)s)",
    )
    flags.add_argument(
        "--clip-search",
        type=int,
        default=20,
        metavar="STEPS",
        help="shrunken ranges tried for each group; 0: minimum and maximum as they are (default: %(default)s)",
    )
    flags.add_argument(
        "--sweeps",
        type=int,
        default=2,
        help="rounds of refinement after GPTQ's own pass, a count; 0: plain GPTQ (default: %(default)s)",
    )
    add_quantizing_arguments(flags, ON_THE_WAY)
    flags.add_argument(
        "--export",
        choices=["gptq"],
        help="gptq: write a plain GPTQ checkpoint besides, OUTPUT-gptqmodel, that transformers loads with gptqmodel",
    )
    return flags


def check_flags(args: argparse.Namespace) -> None:
    """UserError for numbers outside their range."""
    if not 0 < args.damping < 1:
        raise UserError(f"--damping {args.damping:g} is not between 0 and 1; 0.01 is usual.")
    for flag in ("clip_search", "sweeps"):
        if getattr(args, flag) < 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is negative; give 0 or more.")
    if args.export and (args.bits_budget is not None or args.target_bytes_of is not None):
        raise UserError("--export writes one bit width for all layers; leave it or the byte budget out.")


def main(argv: list[str] | None = None) -> None:
    """Quantize one model."""
    args = parser().parse_args(argv)
    check_flags(args)
    backend = GPTQ()
    format = backend.format(args.bits, args.group_size)
    ladder = [{**format, "bits": bits} for bits in BITS if bits >= args.bits]
    search = {
        "symmetric": args.symmetric,
        "act_order": args.act_order,
        "damping": args.damping,
        "clip_steps": args.clip_search,
        "sweeps": args.sweeps,
    }
    check = check_exportable if args.export else None
    output = quantize_stage(args, backend, ladder, search, f"gptq-{args.bits}bit", check, on_the_way=ON_THE_WAY)
    if args.export:
        plain = output.with_name(output.name + "-gptqmodel")
        print(f"wrote {export_gptq(output, plain, args.symmetric)} for gptqmodel")


if __name__ == "__main__":
    run_main(main)
