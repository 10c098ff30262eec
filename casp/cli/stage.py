"""A quantizing stage from its flags to its checkpoint: what all backends' command lines have in common."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from casp.backend import Backend, Format
from casp.budget import Plan, matrices, original_bytes, plan_bytes, promote, uniform_plan
from casp.cli.options import Budget, Compute, Search, union
from casp.cli.places import base_model, default_output, model_folder, stage_input
from casp.cli.quantizing import FineTuning, Quantizing
from casp.data import fingerprint
from casp.errors import UserError
from casp.factors import FACTORS
from casp.finetune.end_to_end import distill
from casp.finetune.in_block import Curve
from casp.finetune.teacher import Teacher
from casp.linear import LowRankLinear, QuantizedLinear
from casp.model.capture import capture_inputs
from casp.model.checkpoint import size
from casp.model.decoder import Decoder
from casp.moments.find import ON_THE_WAY, choose_weighting, find_moments
from casp.moments.store import REMEDY, Moments
from casp.plan.file import Plan as RankPlan
from casp.plan.file import read_plan
from casp.quantize import measure_block_influence, quantize_blocks
from casp.ranks import here
from casp.reading.documents import parse_json, read_json
from casp.rounding import Method
from casp.run.digest import content_hash
from casp.run.files import write_json, write_shard
from casp.run.folder import WORK_PREFIX, check_places
from casp.run.recipe import COMMAND, earlier_steps, read_recipe_step
from casp.run.report import read_report
from casp.run.writer import RunFolder
from casp.seed import matrix_generator

INFLUENCE_FILE = f"{WORK_PREFIX}influence.json"
END_TO_END_FILE = f"{WORK_PREFIX}end-to-end.safetensors"
END_TO_END_STATE = f"{WORK_PREFIX}end-to-end-state.safetensors"
INFLUENCE_SAMPLES = 32  # block influence is a mean over tokens: a few samples settle the order of the blocks


def budget_of(asked: Quantizing, decoder: Decoder, backend: Backend, format: Format) -> Budget:
    """The bytes that all linears may take together; none are set when the plan is simply uniform."""
    if asked.bits_budget is not None:
        return Budget(int(asked.bits_budget * decoder.original_weights() / 8))
    if asked.target_bytes_of is not None:
        return Budget(size(asked.target_bytes_of).bytes)
    return Budget(original_bytes(decoder, backend, format) if decoder.holds(LowRankLinear) else None)


def block_influence(
    run: RunFolder,
    batches: list[dict[str, Tensor]],
    compute: Compute,
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

    def measured() -> list[float]:
        if not kept.exists():
            print("measuring the influence of each block")
            few, samples = [], 0
            for batch in batches:
                if samples < INFLUENCE_SAMPLES:
                    few.append(batch)
                    samples += len(batch["input_ids"])
            write_json(kept, measure_block_influence(run.decoder, few, compute.device, compute.dtype))
        return read_json(kept, "the influence of the blocks", list, run.anew)

    found = run.ranks.told(measured)
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
    compute: Compute,
) -> tuple[dict[str, Tensor], Curve]:
    """Fine-tune the quantized blocks of `run` together; returns what changed outside the blocks, and the curve.

    batches: this rank's.

    What was learned stays in the run folder until that is finished: a rerun goes on from the last epoch.
    """
    decoder, learned_file, ranks = run.decoder, run.folder / END_TO_END_FILE, run.ranks
    if not ranks.told(learned_file.exists):
        targets = teacher.advance_to(len(decoder.blocks) - 1)
        inputs = capture_inputs(decoder, batches, compute.device, compute.dtype, check=False)
        run.load_finished(compute.device, compute.dtype)
        decoder.load_rest(compute.device, compute.dtype)
        learned, curve = distill(
            decoder,
            backend,
            inputs,
            targets,
            tuning.end_to_end,
            matrix_generator(compute.seed, "end to end"),
            compute.device,
            run.folder / END_TO_END_STATE,
            tuning.checkpointing,
            ranks,
        )
        if ranks.first:
            write_shard(learned_file, learned, {"curve": json.dumps(curve)})
        ranks.wait()
    learned, metadata = run.read_shard(learned_file)
    curve = parse_json(metadata.get("curve", ""), f"the curve in {learned_file}", run.anew, list)
    if ranks.first:
        run.replace(learned)
    return {name: tensor for name, tensor in learned.items() if not name.startswith(decoder.blocks_path + ".")}, curve


def planned(asked: Quantizing, decoder: Decoder, backend: Backend, moments: Moments | None) -> RankPlan | None:
    """The plan that --plan names, checked; None without one. UserError where another flag or the moments forbid it."""
    if asked.plan is None:
        return None
    if asked.has_budget:
        raise UserError("--plan says how many bytes every linear takes; leave --bits-budget and --target-bytes-of out.")
    if moments is None or not moments.has_gradients:
        raise UserError(f"--plan needs moments with gradients of {decoder.folder}; collect them with {REMEDY}.")
    return read_plan(asked.plan, decoder, content_hash(decoder.folder), backend)


def stored_formats(plan: RankPlan) -> Plan:
    """Path of every stored matrix -> its format, of a plan of ranks and formats."""
    formats: Plan = {}
    for path, option in plan.linears.items():
        names = [path] if option.rank is None else [f"{path}.{which}" for which in FACTORS]
        formats |= dict(zip(names, option.formats, strict=True))
    return formats


def recipe_step(asked: Quantizing, backend: Backend) -> dict[str, Any]:
    """What the checkpoint says that it was made by: the command that --carry tells of, or this stage."""
    if asked.carry is not None:
        return read_recipe_step(asked.carry)
    return {COMMAND: "quantize", "backend": backend.name, **asked.given}


def quantize_stage(
    asked: Quantizing,
    backend: Backend,
    ladder: Sequence[Format],
    search: Search,
    label: str,
    check: Callable[[Decoder, Format], None] | None = None,
    beside: Callable[[Path], Path] | None = None,
    on_the_way: str = ON_THE_WAY,
) -> Path:
    """Run a quantizing stage; returns the checkpoint's folder.

    ladder: the format asked for and those above it, to which freed bytes may lift a block; search: the backend's
    knobs, passed to `quantize`; label: what the output is filed under (runs/<model>/<label>, with "casp-" before it
    for a model with low-rank layers); check: raises UserError for a model and format that the stage cannot serve,
    before anything is computed; beside: names the folder that will be made of the output afterwards, which is then
    checked before any work; on_the_way: the token weights where none are asked for and second moments are collected
    while quantizing. Moments collected before are those that `casp.moments.find` finds; fine-tuning is towards the
    model that `asked.model` names.
    """
    tuning, ranks = asked.tuning, here()
    decoder = Decoder(stage_input(asked.model, "svd", asked.from_original or asked.plan is not None))
    if decoder.holds(QuantizedLinear):
        raise UserError(f"{decoder.folder} is already quantized; give the original model or the output of stage svd.")
    share = decoder.require_share(asked.allow_partial)
    earlier_steps(decoder.folder)  # what is wrong with a recipe is told now, not when all is done
    step = recipe_step(asked, backend)
    if check is not None:
        check(decoder, ladder[0])
    low_rank = decoder.holds(LowRankLinear)
    stage = f"casp-{label}" if low_rank else label
    compute = asked.compute.of(decoder.dtype)
    data = union(asked.calibration.record(), asked.calibration.contents(), compute.record())
    moments = find_moments(asked.moments, asked.model, data, decoder, low_rank, asked.token_weights)
    weighting = choose_weighting(asked.token_weights, moments, on_the_way)
    obeyed = planned(asked, decoder, backend, moments)
    if obeyed is not None:
        stage = f"casp-{backend.name}-plan"
    output = asked.output or default_output(asked.model, stage)
    budget = budget_of(asked, decoder, backend, ladder[0]) if obeyed is None else Budget(obeyed.bytes)
    batches = []
    if moments is None or tuning.wanted:
        data = replace(asked.calibration, batch_size=asked.calibration.batch_size // tuning.batches)
        batches = data.batches(decoder.folder, compute.seed)
    mine = [batches[number] for number in ranks.mine(len(batches))]
    original = model_folder(asked.model) if tuning.wanted else decoder.folder
    # What a flag says stands in the record where it has a say: data, say, where any is run through the model.
    record = union(
        {"backend": backend.name, "token_weights": weighting, "share_of_weights": round(share, 4)},
        ladder[0] if obeyed is None else {"plan": obeyed.fingerprint()},
        search.record(),
        budget.record(),
        asked.calibration.record() if batches else {},
        compute.record(),
        tuning.record(),
        {} if original.resolve() == decoder.folder.resolve() else {"original": content_hash(original)},
        {"true_sequential": asked.true_sequential} if moments is None else {"moments": moments.identity(decoder)},
    )
    inputs = [original, *asked.calibration.files(), *([moments.folder] if moments else [])]
    inputs += [asked.target_bytes_of] if asked.target_bytes_of else []
    if beside is not None:
        check_places(beside(output), [decoder.folder, *inputs])
    run = RunFolder(
        output, decoder, stage, base_model(decoder.folder, asked.model), record, fingerprint(batches), inputs, ranks
    )
    if run.done:
        print(f"{output} is finished already with these settings")
        return output
    low: dict[str, int] = {}
    if obeyed is not None:
        plan = stored_formats(obeyed)
        low = {path: option.rank for path, option in obeyed.linears.items() if option.rank is not None}
        print(f"{obeyed.bits:.3f} bits per weight as {asked.plan} says, {len(low)} linears of low rank")
    else:
        plan = uniform_plan(decoder, ladder[0])
        shapes = matrices(decoder)
        if budget.bytes is not None:
            influence = block_influence(run, batches, compute, moments)
            plan = promote(plan, shapes, backend, ladder, influence, budget.bytes)
        print(describe_plan(plan, shapes, backend, decoder))
    teacher = None
    if tuning.wanted:
        teacher = Teacher(Decoder(original), mine, compute.device, compute.dtype, ranks.first)
    method = Method(backend, plan, search.record(), compute.seed, asked.true_sequential, tuning.block, weighting, low)
    quantize_blocks(decoder, run, batches, method, compute.device, compute.dtype, moments, teacher)
    if tuning.end_to_end is None:
        run.finish(step=step)
    else:
        outside, curve = end_to_end(run, backend, mine, teacher, tuning, compute)
        run.finish(outside, {"end_to_end": curve}, step)
    result = size(output)
    print(
        f"wrote {output} {run.account()}: {result.bytes / 1e6:.2f} MB of linears, "
        f"{result.bpw:.3f} bits per original weight"
    )
    return output
