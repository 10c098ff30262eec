"""The quantize stage: `python -m casp_gptq --model ... --bits 2`."""

import argparse

from casp.cli import Parser, add_common_arguments, run_main
from casp.cli.quantizing import add_damping_argument, add_quantizing_arguments, quantizing_of
from casp.cli.stage import quantize_stage
from casp.errors import UserError
from casp.numbers import whole
from casp.ranks import here
from casp_gptq.backend import GPTQ
from casp_gptq.export import check_exportable, export_folder, export_gptq
from casp_gptq.grid import BITS
from casp_gptq.options import Search

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
        type=whole(-1),
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
    add_damping_argument(flags)
    flags.add_argument(
        "--clip-search",
        type=whole(0, 1000),
        default=20,
        metavar="STEPS",
        help="steps in which a group's range shrinks, the best looked for coarse to fine; 0: minimum and maximum as "
        "they are (default: %(default)s)",
    )
    flags.add_argument(
        "--sweeps",
        type=whole(0, 1000),
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


def check_overhead(bits: int, group_size: int) -> None:
    """UserError for groups so small that their scales and zeros outweigh the codes."""
    overhead = (16 + bits) / group_size  # a float16 scale and a zero of as many bits as a code
    if overhead > bits:
        raise UserError(
            f"--group-size {group_size} takes {bits + overhead:g} bits a weight with --bits {bits}, "
            "more of them for scales and zeros than for codes; give larger groups."
        )


def main(argv: list[str] | None = None) -> None:
    """Quantize one model."""
    args = parser().parse_args(argv)
    backend = GPTQ()
    format = backend.format(args.bits, args.group_size)
    asked = quantizing_of(args)
    check_overhead(args.bits, args.group_size)
    if args.export:
        asked.check_export()
    ladder = [{**format, "bits": bits} for bits in BITS if bits >= args.bits]
    search = Search(args.symmetric, args.act_order, args.damping, args.clip_search, args.sweeps)
    check, beside = (check_exportable, export_folder) if args.export else (None, None)
    label = f"gptq-{args.bits}bit"
    output = quantize_stage(asked, backend, ladder, search, label, check, beside, ON_THE_WAY)
    if args.export and here().first:
        print(f"wrote {export_gptq(output, export_folder(output), args.symmetric)} for gptqmodel")


if __name__ == "__main__":
    run_main(main, shared=True)
