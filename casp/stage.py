"""A quantizing stage from its flags to its checkpoint: what all backends' command lines have in common."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from casp.backend import Backend, Format
from casp.budget import Plan, matrices, original_bytes, plan_bytes, promote, uniform_plan
from casp.capture import capture_inputs
from casp.checkpoint import size
from casp.cli import default_output, model_folder, model_name, pick_device, pick_dtype, stage_input, visual_of
from casp.data import calibration_batches, fingerprint, sources
from casp.digest import content_hash
from casp.distill import distill
from casp.errors import UserError
from casp.factors import FACTORS
from casp.files import write_json, write_shard
from casp.folder import WORK_PREFIX, check_places
from casp.linear import LowRankLinear, QuantizedLinear
from casp.models import Decoder
from casp.moments.find import (
    ON_THE_WAY,
    add_moments_argument,
    add_token_weights_argument,
    choose_weighting,
    find_moments,
)
from casp.moments.store import REMEDY, Moments
from casp.numbers import real, whole
from casp.plan.file import Plan as RankPlan
from casp.plan.file import read_plan
from casp.quantize import Method, measure_block_influence, quantize_blocks
from casp.reading.documents import parse_json, read_json
from casp.report import read_report
from casp.run import RunFolder
from casp.seed import matrix_generator
from casp.teacher import Teacher
from casp.tuning import Curve, Training

INFLUENCE_FILE = f"{WORK_PREFIX}influence.json"
END_TO_END_FILE = f"{WORK_PREFIX}end-to-end.safetensors"
END_TO_END_STATE = f"{WORK_PREFIX}end-to-end-state.safetensors"
MOST_EPOCHS, MOST_RATE = 10_000, 1.0  # a rate of 1 moves every number by its own size in a step
INFLUENCE_SAMPLES = 32  # block influence is a mean over tokens: a few samples settle the order of the blocks


def add_quantizing_arguments(parser: argparse.ArgumentParser, on_the_way: str = ON_THE_WAY) -> None:
    """Flags of every quantizing stage, besides the common ones; on_the_way: see `quantize_stage`."""
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--bits-budget",
        type=real(0, 64),
        metavar="BPW",
        help="bits per original weight, all overheads counted, that must not be exceeded; what --bits leaves goes to "
        "more bits (default: for a model with low-rank layers, what --bits would take without them)",
    )
    budget.add_argument(
        "--target-bytes-of", type=Path, metavar="DIR", help="the same, as the size of the linears of checkpoint DIR"
    )
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
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="obey this plan of ranks and formats, made by plan.sh and edited if you like, on --model itself; it needs "
        "moments collected before (default: one format for all, --bits)",
    )
    add_moments_argument(parser)
    add_token_weights_argument(parser, on_the_way)


def add_tuning_arguments(parser: argparse.ArgumentParser, block_rate: float, end_to_end_rate: float) -> None:
    """Flags of a stage whose backend can be fine-tuned; the rates are the defaults."""
    parser.add_argument(
        "--ft-epochs",
        type=whole(0, MOST_EPOCHS),
        default=2,
        help="passes over the calibration data in each of the two fine-tunings, in the blocks and end to end; 0: none "
        "of them (default: %(default)s)",
    )
    parser.add_argument(
        "--block-epochs", type=whole(0, MOST_EPOCHS), help="the same within the blocks alone (default: --ft-epochs)"
    )
    parser.add_argument(
        "--e2e-epochs", type=whole(0, MOST_EPOCHS), help="the same end to end alone (default: --ft-epochs)"
    )
    parser.add_argument(
        "--block-lr",
        type=real(0, MOST_RATE),
        default=block_rate,
        help="learning rate within the blocks, relative to each tensor's root mean square (default: %(default)s)",
    )
    parser.add_argument(
        "--e2e-lr",
        type=real(0, MOST_RATE),
        default=end_to_end_rate,
        help="learning rate end to end, relative in the same way (default: %(default)s)",
    )
    parser.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end to end, compute each block a second time for its gradient: one block's activations and dense "
        "weights in memory instead of all (default: on)",
    )


@dataclass(frozen=True)
class FineTuning:
    """What is fine-tuned after or while quantizing: None where a part is left out."""

    block: Training | None = None
    end_to_end: Training | None = None
    checkpointing: bool = True

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> "FineTuning":
        """What the flags of `add_tuning_arguments` ask for."""
        parts = []
        for part in ("block", "e2e"):
            epochs, rate = getattr(args, f"{part}_epochs"), getattr(args, f"{part}_lr")
            if epochs is None:
                epochs = args.ft_epochs
            parts.append(Training(epochs, rate) if epochs else None)
        return cls(*parts, checkpointing=args.gradient_checkpointing)

    @property
    def wanted(self) -> bool:
        """Whether anything is to be tuned."""
        return self.block is not None or self.end_to_end is not None


def calibration_record(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, data: bool = True
) -> dict[str, Any]:
    """What the common flags say of the data, where it is used at all, and of how it is run: for a run's settings."""
    about_data = {
        "dataset": args.dataset,
        "samples": args.samples,
        "sequence_length": args.sequence_length,
        "batch_size": args.batch_size,
        "frames": args.frames,
        "visual_tokens": args.visual_tokens,
    }
    return {
        **(about_data if data else {}),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "seed": args.seed,
    }


def holds(decoder: Decoder, kind: type) -> bool:
    """Whether a linear of the decoder's blocks is a `kind`."""
    return any(isinstance(module, kind) for block in decoder.block_list for module in block.modules())


def base_model(folder: Path, model: str) -> str:
    """What the checkpoint in `folder`, that was asked for as `model`, derives from, for its card: the hub id.

    An earlier stage has recorded it; else it is `model`, or for a local folder that folder's name.
    """
    earlier = read_report(folder)
    if earlier is not None:
        return earlier["base_model"]
    return model_name(model) if Path(model).is_dir() else model


def byte_budget(args: argparse.Namespace, decoder: Decoder, backend: Backend, format: Format) -> int | None:
    """The bytes that all linears may take together; None when the plan is simply uniform."""
    if args.bits_budget is not None:
        return int(args.bits_budget * decoder.original_weights() / 8)
    if args.target_bytes_of is not None:
        return size(args.target_bytes_of).bytes
    return original_bytes(decoder, backend, format) if holds(decoder, LowRankLinear) else None


def block_influence(
    run: RunFolder,
    batches: list[dict[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    moments: Moments | None = None,
) -> list[float]:
    """Influence of every block: as the SVD stage's report or the moments say, else measured (once a run)."""
    depth = len(run.decoder.blocks)
    report = read_report(run.decoder.folder)
    if report is not None:
        known = [block.get("block_influence") for block in report["blocks"]]
        if len(known) == depth and None not in known:
            return known
    if moments is not None:
        return [moments.read(index).influence for index in range(depth)]
    kept = run.folder / INFLUENCE_FILE
    if not kept.exists():
        print("measuring the influence of each block")
        few, samples = [], 0
        for batch in batches:
            if samples < INFLUENCE_SAMPLES:
                few.append(batch)
                samples += len(batch["input_ids"])
        write_json(kept, measure_block_influence(run.decoder, few, device, dtype))
    found = read_json(kept, "the influence of the blocks", list, run.anew)
    if len(found) != depth or not all(isinstance(value, float | int) for value in found):
        raise UserError(f"{kept} is not what this run wrote; {run.anew}.")
    return found


def describe_plan(plan: Plan, shapes: dict[str, tuple[int, int, int]], backend: Backend, decoder: Decoder) -> str:
    """One line a user can check: how many matrices are at which bits, and bits per original weight."""
    counts: dict[Any, int] = {}
    for format in plan.values():
        counts[format["bits"]] = counts.get(format["bits"], 0) + 1
    bpw = 8 * plan_bytes(plan, shapes, backend) / decoder.original_weights()
    return f"{bpw:.3f} bits per weight: " + ", ".join(
        f"{n} matrices at {bits} bits" for bits, n in sorted(counts.items())
    )


def end_to_end(
    run: RunFolder,
    backend: Backend,
    batches: list[dict[str, Tensor]],
    teacher: Teacher,
    tuning: FineTuning,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> tuple[dict[str, Tensor], Curve]:
    """Fine-tune the quantized blocks of `run` together; returns what changed outside the blocks, and the curve.

    What was learned stays in the run folder until that is finished: a rerun goes on from the last epoch.
    """
    decoder, learned_file = run.decoder, run.folder / END_TO_END_FILE
    if not learned_file.exists():
        targets = teacher.advance_to(len(decoder.blocks) - 1)
        inputs = capture_inputs(decoder, batches, device, dtype, check=False)
        run.load_finished(device, dtype)
        decoder.load_rest(device, dtype)
        learned, curve = distill(
            decoder,
            backend,
            inputs,
            targets,
            tuning.end_to_end,
            matrix_generator(seed, "end to end"),
            device,
            run.folder / END_TO_END_STATE,
            tuning.checkpointing,
        )
        write_shard(learned_file, learned, {"curve": json.dumps(curve)})
    learned, metadata = run.read_shard(learned_file)
    curve = parse_json(metadata.get("curve", ""), f"the curve in {learned_file}", run.anew, list)
    run.replace(learned)
    return {name: tensor for name, tensor in learned.items() if not name.startswith(decoder.blocks_path + ".")}, curve


def planned(args: argparse.Namespace, decoder: Decoder, backend: Backend, moments: Moments | None) -> RankPlan | None:
    """The plan that --plan names, checked; None without one. UserError where another flag or the moments forbid it."""
    if args.plan is None:
        return None
    if args.bits_budget is not None or args.target_bytes_of is not None:
        raise UserError("--plan says how many bytes every linear takes; leave --bits-budget and --target-bytes-of out.")
    if moments is None or not moments.has_gradients:
        raise UserError(f"--plan needs moments with gradients of {decoder.folder}; collect them with {REMEDY}.")
    return read_plan(args.plan, decoder, content_hash(decoder.folder), backend)


def stored_formats(plan: RankPlan) -> Plan:
    """Path of every stored matrix -> its format, of a plan of ranks and formats."""
    formats: Plan = {}
    for path, option in plan.linears.items():
        names = [path] if option.rank is None else [f"{path}.{which}" for which in FACTORS]
        formats |= dict(zip(names, option.formats, strict=True))
    return formats


def quantize_stage(
    args: argparse.Namespace,
    backend: Backend,
    ladder: Sequence[Format],
    settings: dict[str, Any],
    label: str,
    check: Callable[[Decoder, Format], None] | None = None,
    tuning: FineTuning = FineTuning(),
    beside: Callable[[Path], Path] | None = None,
    on_the_way: str = ON_THE_WAY,
) -> Path:
    """Run a quantizing stage as its flags say; returns the checkpoint's folder.

    ladder: the format asked for and those above it, to which freed bytes may lift a block; settings: the
    backend's knobs of the search, passed to `quantize`; label: what the output is filed under
    (runs/<model>/<label>, with "casp-" before it for a model with low-rank layers); check: raises UserError
    for a model and format that the stage cannot serve, before anything is computed; tuning: towards the model that
    `args.model` names; beside: names the folder that will be made of the output afterwards, which is then checked
    before any work; on_the_way: the token weights where none are asked for and second moments are collected while
    quantizing. Moments collected before are those that `casp.moments.find` finds.
    """
    decoder = Decoder.open(stage_input(args.model, "svd", args.from_original or args.plan is not None))
    if holds(decoder, QuantizedLinear):
        raise UserError(f"{decoder.folder} is already quantized; give the original model or the output of stage svd.")
    share = decoder.require_share(args.allow_partial)
    if check is not None:
        check(decoder, ladder[0])
    low_rank = holds(decoder, LowRankLinear)
    stage = f"casp-{label}" if low_rank else label
    moments = find_moments(args, decoder, low_rank, args.token_weights)
    weighting = choose_weighting(args.token_weights, moments, on_the_way)
    obeyed = planned(args, decoder, backend, moments)
    if obeyed is not None:
        stage = f"casp-{backend.name}-plan"
    output = args.output or default_output(args.model, stage)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, decoder.dtype)
    budget = byte_budget(args, decoder, backend, ladder[0]) if obeyed is None else obeyed.bytes
    batches = []
    if moments is None or tuning.wanted:
        batches = calibration_batches(
            decoder.folder,
            args.dataset,
            args.samples,
            args.sequence_length,
            args.seed,
            args.batch_size,
            visual_of(args),
        )
    record = {
        "backend": backend.name,
        **(ladder[0] if obeyed is None else {"plan": obeyed.fingerprint()}),
        **settings,
        "byte_budget": budget,
        "share_of_weights": round(share, 4),
        **calibration_record(args, device, dtype, data=bool(batches)),
    }
    original = model_folder(args.model) if tuning.wanted else decoder.folder
    if tuning.wanted:
        record["fine_tuning"] = asdict(tuning)
    if original.resolve() != decoder.folder.resolve():
        record["original"] = content_hash(original)
    record["token_weights"] = weighting
    if moments is not None:
        record["moments"] = moments.identity(decoder)
    else:
        record["true_sequential"] = args.true_sequential
    inputs = [original, *sources.files(args.dataset), *([moments.folder] if moments else [])]
    inputs += [args.target_bytes_of] if args.target_bytes_of else []
    if beside is not None:
        check_places(beside(output), [decoder.folder, *inputs])
    run = RunFolder(
        output, decoder, stage, base_model(decoder.folder, args.model), record, fingerprint(batches), inputs
    )
    if run.done:
        print(f"{output} is finished already with these settings")
        return output
    ranks: dict[str, int] = {}
    if obeyed is not None:
        plan = stored_formats(obeyed)
        ranks = {path: option.rank for path, option in obeyed.linears.items() if option.rank is not None}
        print(f"{obeyed.bits:.3f} bits per weight as {args.plan} says, {len(ranks)} linears of low rank")
    else:
        plan = uniform_plan(decoder, ladder[0])
        shapes = matrices(decoder)
        if budget is not None:
            plan = promote(plan, shapes, backend, ladder, block_influence(run, batches, device, dtype, moments), budget)
        print(describe_plan(plan, shapes, backend, decoder))
    teacher = Teacher(Decoder.open(original), batches, device, dtype) if tuning.wanted else None
    method = Method(backend, plan, settings, args.seed, args.true_sequential, tuning.block, weighting, ranks)
    quantize_blocks(decoder, run, batches, method, device, dtype, moments, teacher)
    if tuning.end_to_end is None:
        run.finish()
    else:
        outside, curve = end_to_end(run, backend, batches, teacher, tuning, device, dtype, args.seed)
        run.finish(outside, {"end_to_end": curve})
    result = size(output)
    print(
        f"wrote {output} {run.account()}: {result.bytes / 1e6:.2f} MB of linears, "
        f"{result.bpw:.3f} bits per original weight"
    )
    return output
