"""Quantize and fine-tune: `python -m casp_quip_sharp --model ... --bits 2`."""

import argparse

from casp.backend import Format
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
from casp.numbers import whole
from casp_quip_sharp.backend import QuipSharp
from casp_quip_sharp.codebook import FAMILIES, codebook_of, rates
from casp_quip_sharp.options import Search


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(
        prog="python -m casp_quip_sharp",
        description="Quantize a model's decoder with QuIP# and fine-tune it. After stage SVD, the bytes that low-rank "
        "layers free buy more bits for the blocks of highest block influence.",
    )
    add_common_arguments(flags, default_model="meta-llama/Llama-2-7b-hf")
    flags.add_argument(
        "--bits",
        type=int,
        default=2,
        help="bits a weight: 1 to 4, with the trellis of 256 states also 5 and 6 (default: %(default)s)",
    )
    flags.add_argument(
        "--codebook",
        choices=FAMILIES,
        default="trellis",
        help="what weights are rounded to: trellis = closed walks down the columns, e8p = the lattice E8 of the QuIP# "
        "paper (default: %(default)s)",
    )
    flags.add_argument(
        "--trellis-states",
        type=int,
        default=8,
        metavar="L",
        help="the trellis has 2^L states: 8, the one that kernels are made for, 10 or 12 (default: %(default)s)",
    )
    add_damping_argument(flags)
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
        help="most rounds of coordinate descent after LDLQ, a count; none follows one that gained little "
        "(default: 4 with e8p, 1 with the trellis)",
    )
    add_tuning_arguments(flags)
    add_quantizing_arguments(flags)
    return flags


def label(format: Format, tuning: FineTuning) -> str:
    """What the output is filed under: quip-sharp-trellis-2bit, -states10 where not 8, and what was fine-tuned."""
    words = ["quip-sharp", format.get("codebook", "e8p"), f"{format['bits']}bit"]
    if format.get("states", 8) != 8:
        words.append(f"states{format['states']}")
    return "-".join([*words, *tuning.words])


def main(argv: list[str] | None = None) -> None:
    """Quantize one model."""
    args = parser().parse_args(argv)
    tuning = fine_tuning_of(args)
    backend = QuipSharp()
    backend.format(args.bits, False, args.codebook, args.trellis_states)
    ladder = [
        backend.format(bits, tuning.wanted, args.codebook, args.trellis_states)
        for bits in rates(args.codebook, args.trellis_states)
        if bits >= args.bits
    ]
    sweeps = codebook_of(ladder[0]).effort.sweeps if args.sweeps is None else args.sweeps
    search = Search(args.damping, args.scale_search, sweeps)
    quantize_stage(quantizing_of(args, tuning), backend, ladder, search, label(ladder[0], tuning))


if __name__ == "__main__":
    run_main(main, shared=True)
