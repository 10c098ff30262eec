"""Quantize and fine-tune: `python -m casp_aqlm --model ... --scheme 2x8g8`."""

import argparse

from casp.cli import Parser, add_common_arguments, run_main
from casp.cli.quantizing import (
    FineTuning,
    add_damping_argument,
    add_quantizing_arguments,
    add_tuning_arguments,
    fine_tuning_of,
    quantizing_of,
)
from casp.cli.stage import quantize_stage
from casp.numbers import real, whole
from casp.ranks import here
from casp_aqlm.backend import AQLM, OFFERED
from casp_aqlm.export import check_exportable, export_aqlm, export_folder
from casp_aqlm.options import Rounds
from casp_aqlm.scheme import ENTRY_DTYPES, Scheme


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(
        prog="python -m casp_aqlm",
        description="Quantize a model's decoder with AQLM and fine-tune it. After stage SVD, the bytes that low-rank "
        "layers free buy more bits for the blocks of highest block influence.",
    )
    add_common_arguments(flags, default_model="meta-llama/Llama-2-7b-hf")
    flags.add_argument(
        "--scheme",
        default="2x8g8",
        help="MxBgG: M codebooks of 2^B entries over groups of G weights, M B / G bits a weight besides codebooks and "
        "scales (default: %(default)s)",
    )
    flags.add_argument(
        "--entries",
        choices=ENTRY_DTYPES,
        default="float16",
        help="what codebooks are stored as; int8 halves them, which tells on small matrices, and so does float8, with "
        "more error (default: %(default)s)",
    )
    add_damping_argument(flags)
    flags.add_argument(
        "--tolerance",
        type=real(0, 1),
        default=0.01,
        help="relative gain of a round over codes, codebooks and scales below which no other follows "
        "(default: %(default)s)",
    )
    flags.add_argument(
        "--max-rounds", type=whole(0, 1000), default=12, help="the most rounds, a count (default: %(default)s)"
    )
    add_tuning_arguments(flags)
    add_quantizing_arguments(flags)
    flags.add_argument(
        "--export",
        choices=["aqlm"],
        help="aqlm: write a plain AQLM checkpoint besides, OUTPUT-aqlm, that transformers loads with the package aqlm",
    )
    return flags


def label(scheme: Scheme, tuning: FineTuning) -> str:
    """What the output is filed under: aqlm-2x8g8, and what of it was fine-tuned."""
    return "-".join([f"aqlm-{scheme}", *tuning.words])


def main(argv: list[str] | None = None) -> None:
    """Quantize one model."""
    args = parser().parse_args(argv)
    tuning = fine_tuning_of(args)
    asked = quantizing_of(args, tuning)
    if args.export:
        asked.check_export()
    backend, scheme = AQLM(), Scheme.parse(args.scheme, args.entries)
    above = [Scheme.parse(text, args.entries) for text in OFFERED]
    ladder = [scheme.format, *(rung.format for rung in above if rung.bits > scheme.bits)]
    search = Rounds(args.damping, args.tolerance, args.max_rounds)
    output = quantize_stage(
        asked,
        backend,
        ladder,
        search,
        label(scheme, tuning),
        check_exportable if args.export else None,
        export_folder if args.export else None,
    )
    if args.export and here().first:
        print(f"wrote {export_aqlm(output, export_folder(output))} for the package aqlm")


if __name__ == "__main__":
    run_main(main, shared=True)
