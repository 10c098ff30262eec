"""A quantizing stage from its flags to its checkpoint: what all backends' command lines have in common."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from casp.backend import Backend, Format
from casp.budget import Plan, matrices, original_bytes, plan_bytes, promote, uniform_plan
from casp.calibration import calibration_batches, fingerprint
from casp.checkpoint import size
from casp.cli import default_output, model_name, pick_device, pick_dtype, stage_input
from casp.models import Decoder
from casp.quantize import measure_block_influence, quantize_model
from casp.run import REPORT_FILE, RunFolder, write_json

INFLUENCE_FILE = "block-influence.json"


def add_quantizing_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every quantizing stage, besides the common ones."""
    parser.add_argument(
        "--from-original",
        action="store_true",
        help="start from --model itself even where the SVD stage has an output for it (default: off)",
    )
    parser.add_argument(
        "--true-sequential",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="each matrix sees what the quantized earlier ones of its block produce: one pass over the calibration "
        "data per group of matrices instead of one per block (default: on)",
    )


def block_influence(
    run: RunFolder, batches: list[dict[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> list[float]:
    """Influence of every block: from the SVD stage's report if the model has one, else measured (once a run)."""
    report = run.decoder.folder / REPORT_FILE
    if report.exists():
        blocks = json.loads(report.read_text())["blocks"]
        if all("block_influence" in block for block in blocks):
            return [block["block_influence"] for block in blocks]
    kept = run.folder / INFLUENCE_FILE
    if not kept.exists():
        print("measuring the influence of each block")
        write_json(kept, measure_block_influence(run.decoder, batches, device, dtype))
    return json.loads(kept.read_text())


def make_plan(decoder: Decoder, backend: Backend, ladder: Sequence[Format], influence: Sequence[float] | None) -> Plan:
    """Formats for every matrix: the ladder's first, and if `influence` is given what the same bytes allow.

    The budget is what the original model would take in the ladder's first format; low-rank layers leave part
    of it, which lifts the blocks of highest influence up the ladder.
    """
    plan = uniform_plan(decoder, ladder[0])
    if influence is None:
        return plan
    budget = original_bytes(decoder, backend, ladder[0])
    return promote(plan, matrices(decoder), backend, ladder, influence, budget)


def describe_plan(plan: Plan, shapes: dict[str, tuple[int, int, int]], backend: Backend, decoder: Decoder) -> str:
    """One line a user can check: how many matrices are at which bits, and bits per original weight."""
    counts: dict[Any, int] = {}
    for format in plan.values():
        counts[format["bits"]] = counts.get(format["bits"], 0) + 1
    bpw = 8 * plan_bytes(plan, shapes, backend) / decoder.original_weights()
    return f"{bpw:.3f} bits per weight: " + ", ".join(
        f"{n} matrices at {bits} bits" for bits, n in sorted(counts.items())
    )


def quantize_stage(
    args: argparse.Namespace, backend: Backend, ladder: Sequence[Format], settings: dict[str, Any], label: str
) -> Path:
    """Run a quantizing stage as its flags say; returns the checkpoint's folder.

    ladder: the format asked for and those above it, to which freed bytes may lift a block; settings: the
    backend's knobs of the search, passed to `quantize`; label: what the output is filed under
    (runs/<model>/<label>, with "casp-" before it for a model with low-rank layers).
    """
    source = stage_input(args.model, "svd", args.from_original)
    decoder = Decoder.open(source)
    low_rank = decoder.compression is not None
    stage = f"casp-{label}" if low_rank else label
    output = args.output or default_output(args.model, stage)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, decoder.dtype)
    batches = calibration_batches(source, args.dataset, args.samples, args.sequence_length, args.seed, args.batch_size)
    record = {
        "backend": backend.name,
        "format": dict(ladder[0]),
        **settings,
        "true_sequential": args.true_sequential,
        "dataset": args.dataset,
        "samples": args.samples,
        "sequence_length": args.sequence_length,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
    }
    run = RunFolder(output, decoder, stage, model_name(args.model), record, fingerprint(batches))
    if run.done:
        print(f"{output} is finished already with these settings")
        return output
    began = time.perf_counter()
    plan = make_plan(decoder, backend, ladder, block_influence(run, batches, device, dtype) if low_rank else None)
    print(describe_plan(plan, matrices(decoder), backend, decoder))
    quantize_model(decoder, run, batches, backend, plan, device, dtype, args.seed, args.true_sequential, settings)
    result = size(output)
    print(f"{output}: {result.bytes / 1e6:.1f} MB for the decoder's linears, {result.bpw:.3f} bits per weight")
    print(f"finished in {time.perf_counter() - began:.0f} s")
    return output
