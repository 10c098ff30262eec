"""The quantize stage: `python -m casp_gptq --model ... --bits 2`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from casp.backend import Format
from casp.budget import Plan, matrices, original_bytes, promote, uniform_plan
from casp.calibration import calibration_batches, fingerprint
from casp.checkpoint import size
from casp.cli import (
    Parser,
    add_common_arguments,
    default_output,
    pick_device,
    pick_dtype,
    run_main,
    stage_input,
)
from casp.errors import UserError
from casp.linear import LowRankLinear, QuantizedLinear
from casp.models import Decoder
from casp.quantize import measure_block_influence, quantize_model
from casp.run import RunFolder, write_json
from casp_gptq.backend import GPTQ
from casp_gptq.export import check_exportable, export_gptq
from casp_gptq.grid import BITS

_INFLUENCE_SAMPLES = 32  # block influence is a mean over tokens: a few samples settle the order of the blocks
# Named such that the run folder, once finished, clears it away with the reports of the single blocks.
_INFLUENCE_FILE = "block-influence.json"


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
        "--true-sequential",
        action=on_off,
        default=True,
        help="within a block, let each matrix see what the quantized earlier ones produce (default: %(default)s)",
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
    budget = flags.add_mutually_exclusive_group()
    budget.add_argument(
        "--bits-budget",
        type=float,
        metavar="BPW",
        help="bits per original weight, all overheads counted, that must not be exceeded; what --bits leaves goes to "
        "more bits (default: for a model with low-rank layers, what --bits would take without them)",
    )
    budget.add_argument(
        "--target-bytes-of", type=Path, metavar="DIR", help="the same, as the size of the linears of checkpoint DIR"
    )
    flags.add_argument(
        "--from-original",
        action="store_true",
        help="start from --model itself even if stage SVD has an output for it",
    )
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


def has(decoder: Decoder, kind: type) -> bool:
    """Whether a linear of the decoder's blocks is a `kind`."""
    return any(isinstance(module, kind) for block in decoder.block_list for module in block.modules())


def byte_budget(args: argparse.Namespace, decoder: Decoder, backend: GPTQ, format: Format) -> int | None:
    """The bytes that all linears may take together; None when the plan is simply uniform."""
    if args.bits_budget is not None:
        return int(args.bits_budget * decoder.original_weights() / 8)
    if args.target_bytes_of is not None:
        return size(args.target_bytes_of).bytes
    return original_bytes(decoder, backend, format) if has(decoder, LowRankLinear) else None


def plan_formats(
    decoder: Decoder, backend: GPTQ, format: Format, budget: int | None, influence: Sequence[float]
) -> Plan:
    """Every matrix in `format`, and what `budget` leaves spent on the blocks of highest `influence`."""
    plan = uniform_plan(decoder, format)
    if budget is None:
        return plan
    ladder = [{**format, "bits": bits} for bits in BITS if bits >= format["bits"]]
    return promote(plan, matrices(decoder), backend, ladder, influence, budget)


def block_influence(
    run: RunFolder, batches: list[dict[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> list[float]:
    """Block influence of the model in `run`; measured once and kept in its folder, so that a resumed run agrees."""
    kept = run.folder / _INFLUENCE_FILE
    if not kept.exists():
        few, samples = [], 0
        for batch in batches:
            if samples < _INFLUENCE_SAMPLES:
                few.append(batch)
                samples += len(batch["input_ids"])
        write_json(kept, measure_block_influence(run.decoder, few, device, dtype))
    return json.loads(kept.read_text())


def main(argv: list[str] | None = None) -> None:
    """Quantize one model."""
    args = parser().parse_args(argv)
    check_flags(args)
    backend = GPTQ()
    format = backend.format(args.bits, args.group_size)
    decoder = Decoder.open(stage_input(args.model, "svd", args.from_original))
    if has(decoder, QuantizedLinear):
        raise UserError(f"{decoder.folder} is already quantized; give the original model or the output of stage SVD.")
    if args.export:
        check_exportable(decoder, format)
    budget = byte_budget(args, decoder, backend, format)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, decoder.dtype)
    batches = calibration_batches(
        decoder.folder, args.dataset, args.samples, args.sequence_length, args.seed, args.batch_size
    )
    search = {
        "symmetric": args.symmetric,
        "act_order": args.act_order,
        "damping": args.damping,
        "clip_steps": args.clip_search,
        "sweeps": args.sweeps,
    }
    settings = {
        "backend": backend.name,
        **format,
        **search,
        "true_sequential": args.true_sequential,
        "byte_budget": budget,
        "dataset": args.dataset,
        "samples": args.samples,
        "sequence_length": args.sequence_length,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": args.seed,
    }
    name = "casp-gptq" if has(decoder, LowRankLinear) else "gptq"
    output = args.output or default_output(args.model, name)
    run = RunFolder(output, decoder, name, args.model, settings, fingerprint(batches))
    if run.done:
        print(f"{output} is finished already")
    else:
        influence = [] if budget is None else block_influence(run, batches, device, dtype)
        plan = plan_formats(decoder, backend, format, budget, influence)
        quantize_model(decoder, run, batches, backend, plan, device, dtype, args.seed, args.true_sequential, search)
    if args.export:
        plain = output.with_name(output.name + "-gptqmodel")
        print(f"wrote {export_gptq(output, plain, args.symmetric)} for gptqmodel")
    result = size(output)
    print(f"wrote {output}: decoder linears {result.bytes} bytes, {result.bpw:.3f} bits per original weight")


if __name__ == "__main__":
    run_main(main)
