"""The moments' stage: `python -m casp.moments --model ...`, once for any number of compressions."""

import argparse

from casp.cli import (
    Parser,
    add_common_arguments,
    base_model,
    calibration_of,
    compute_of,
    default_output,
    run_main,
    stage_input,
    union,
)
from casp.data import fingerprint
from casp.errors import UserError
from casp.linear import LowRankLinear, QuantizedLinear
from casp.model.batch import answers_of
from casp.model.decoder import Decoder
from casp.moments.collect import collect
from casp.moments.find import stage_name
from casp.moments.weights import EXPLAINED, USUAL, by_gradient, weighting_parts
from casp.ranks import here
from casp.run.folder import WorkFolder


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(
        prog="python -m casp.moments",
        description="Collect, once for every stage, the second moments of what the linears of a model's decoder take "
        "in and of the loss's gradients at what they put out.",
    )
    add_common_arguments(flags, default_model="meta-llama/Llama-2-7b-hf")
    flags.add_argument(
        "--token-weights",
        nargs="+",
        metavar="WEIGHTS",
        default=list(USUAL),
        help="how tokens count in the moments of the inputs, one set of moments for each: "
        + "; ".join(f"{name} = {words}" for name, words in EXPLAINED.items())
        + f" (default: {' '.join(USUAL)})",
    )
    flags.add_argument(
        "--gradients",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="walk backward too, for weights by gradient and the moments of the gradients themselves (default: on)",
    )
    flags.add_argument(
        "--from-original",
        action="store_true",
        help="collect on --model itself even where the SVD stage has an output for it (default: off)",
    )
    return flags


def wanted_weightings(given: list[str], gradients: bool) -> list[str]:
    """The single token weights that `given` asks for, sums taken apart, in a fixed order; UserError for a bad one."""
    parts = {part for weighting in given for part in weighting_parts(weighting)}
    impossible = sorted(part for part in parts if by_gradient(part))
    if impossible and not gradients:
        raise UserError(f"--token-weights {impossible[0]} needs gradients; leave out one of it and --no-gradients.")
    return [name for name in EXPLAINED if name in parts]


def main(argv: list[str] | None = None) -> None:
    """Collect the moments of one model."""
    args = parser().parse_args(argv)
    weightings = wanted_weightings(args.token_weights, args.gradients)
    decoder = Decoder(stage_input(args.model, "svd", args.from_original))
    if decoder.holds(QuantizedLinear):
        raise UserError(f"{decoder.folder} is already quantized; give the original model or the output of stage svd.")
    share = decoder.require_share(args.allow_partial)
    stage = stage_name(decoder.holds(LowRankLinear))
    output = args.output or default_output(args.model, stage)
    calibration, compute = calibration_of(args), compute_of(args).of(decoder.dtype)
    batches = calibration.batches(decoder.folder, compute.seed)
    what = {"token_weights": weightings, "gradients": args.gradients, "share_of_weights": round(share, 4)}
    if len({answers_of(batch) is None for batch in batches}) > 1:
        what["energies"] = "bounded by kind"  # of moments from before that, a rerun is told
    settings = union(what, calibration.record(), calibration.contents(), compute.record())
    work = WorkFolder(
        output,
        decoder,
        stage,
        base_model(decoder.folder, args.model),
        settings,
        fingerprint(batches),
        calibration.files(),
        here(),
    )
    if work.done:
        print(f"{output} is finished already with these settings")
        return
    collect(decoder, work, batches, compute.device, compute.dtype, weightings, args.gradients)
    stored = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    print(f"wrote {output} {work.account()}: {stored / 1e6:.0f} MB")


if __name__ == "__main__":
    run_main(main, shared=True)
