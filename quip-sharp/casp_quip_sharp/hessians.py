"""The Hessian stage: `python -m casp_quip_sharp.hessians --model ...`, once for any number of quantizations."""

import argparse

from casp.cli import (
    Parser,
    add_common_arguments,
    default_output,
    model_name,
    pick_device,
    pick_dtype,
    run_main,
    stage_input,
)
from casp.data import calibration_batches, fingerprint
from casp.errors import UserError
from casp.folder import WorkFolder
from casp.hessians import WEIGHTINGS, add_weighting_argument, collect
from casp.linear import LowRankLinear, QuantizedLinear
from casp.models import Decoder
from casp.stage import calibration_record, holds

STAGE = "hessians"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(
        prog="python -m casp_quip_sharp.hessians",
        description="Collect the second moments of the inputs of a decoder's linears, for quantize_finetune_*.sh.",
    )
    add_common_arguments(flags, default_model="meta-llama/Llama-2-7b-hf")
    add_weighting_argument(flags)
    flags.add_argument(
        "--from-original",
        action="store_true",
        help="collect on --model itself even where the SVD stage has an output for it (default: off)",
    )
    return flags


def main(argv: list[str] | None = None) -> None:
    """Collect the Hessians of one model."""
    args = parser().parse_args(argv)
    decoder = Decoder.open(stage_input(args.model, "svd", args.from_original))
    if holds(decoder, QuantizedLinear):
        raise UserError(f"{decoder.folder} is already quantized; give the original model or the output of stage svd.")
    stage = f"casp-{STAGE}" if holds(decoder, LowRankLinear) else STAGE
    output = args.output or default_output(args.model, stage)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, decoder.dtype)
    batches = calibration_batches(
        decoder.folder, args.dataset, args.samples, args.sequence_length, args.seed, args.batch_size
    )
    settings = {"token_weights": args.token_weights, **calibration_record(args, device, dtype)}
    folder = WorkFolder(output, decoder, stage, model_name(args.model), settings, fingerprint(batches))
    if folder.done:
        print(f"{output} is finished already with these settings")
        return
    collect(decoder, folder, batches, device, dtype, WEIGHTINGS[args.token_weights])
    stored = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    print(f"wrote {output} {folder.account()}: {stored / 1e6:.0f} MB")


if __name__ == "__main__":
    run_main(main)
