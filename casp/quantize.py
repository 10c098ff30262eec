"""Quantizing a decoder with any backend, block by block, as a plan of formats says."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from casp.finetune.in_block import tunable_tensors, tune_block
from casp.finetune.teacher import Teacher
from casp.model.capture import capture_inputs
from casp.model.decoder import Decoder
from casp.model.split import side_by_side
from casp.moments.forward import block_moments, token_weights
from casp.moments.store import BlockMoments, LinearMoments, Moments
from casp.rounding import Method, Work, round_all
from casp.run.writer import RunFolder
from casp.seed import matrix_generator
from casp.walk import Visit, walk


def _given(hessian: Tensor) -> Tensor:
    return hessian


def _read(moments: LinearMoments, weighting: str, device: torch.device) -> Tensor:
    return moments.hessian(weighting).to(device)


def quantize_block(
    visit: Visit,
    decoder: Decoder,
    method: Method,
    moments: BlockMoments | None = None,
    targets: list[Tensor] | None = None,
) -> dict[str, Any]:
    """Quantize every matrix of one block in place; returns its report: bits and error by role, curves of tuning.

    moments: of the block's matrices, collected before; None: second moments are collected here.
    targets: what the block should put out, per batch, for `method.block_training`.
    """
    roles = {path: role for role, path in decoder.linears(visit.index, factors=True).items()}
    groups = visit.ranks.told(lambda: visit.input_groups(list(roles))) if moments is None else moments.groups
    one_by_one = method.true_sequential or method.block_training is not None
    weights = token_weights(visit, method.weighting) if moments is None else None
    prefix = decoder.blocks[visit.index]
    generator = matrix_generator(method.seed, f"{prefix} tuning")
    linears: dict[str, dict[str, Any]] = {}
    tuning = []
    for stage in side_by_side(groups) if one_by_one else [groups]:
        shared = block_moments(visit, stage, weights) if moments is None else [None] * len(stage)
        works: list[Work] = []
        for group, seen in zip(stage, shared, strict=True):
            low = [path for path in group if f"{prefix}.{path}" in method.ranks]
            whole = [path for path in group if path not in low]
            works += [Work([path], [roles[path]], moments=moments[path]) for path in low]
            for paths in [whole] if moments is None else moments.sharing(whole, method.weighting):
                if moments is None:
                    hessian = partial(_given, seen)
                else:
                    hessian = partial(_read, moments[paths[0]], method.weighting, visit.device)
                works.append(Work(paths, [roles[path] for path in paths], hessian))
        linears |= round_all(visit, works, prefix, method)
        shared.clear()
        if method.block_training is not None:
            curve = tune_block(visit, targets, method.backend, method.block_training, generator)
            tuning.append({"after": [roles[path] for group in stage for path in group], "curve": curve})
    return {"linears": linears, **({"tuning": tuning} if tuning else {})}


def quantize_blocks(
    decoder: Decoder,
    run: RunFolder,
    batches: list[dict[str, Tensor]],
    method: Method,
    device: torch.device,
    dtype: torch.dtype,
    moments: Moments | None = None,
    teacher: Teacher | None = None,
) -> None:
    """Quantize all blocks into `run`; finished blocks of an earlier attempt are taken as they are.

    moments: collected before; teacher: the original model on the same batches, for block fine-tuning. With the first
    and without the second no data is run through the model. Where the teacher is the model that is quantized, what its
    first block is fed serves both.
    """
    needs_data = moments is None or method.block_training is not None
    same = teacher is not None and teacher.decoder.folder.resolve() == decoder.folder.resolve()
    captured = teacher.inputs if same and teacher.index == 0 else None
    for visit in run.walk(batches if needs_data else None, device, dtype, captured):
        known = None if moments is None else moments.read(visit.index)
        targets = None if method.block_training is None else teacher.advance_to(visit.index)
        report = quantize_block(visit, decoder, method, known, targets)
        tuned = () if targets is None else tunable_tensors(visit.block, method.backend)
        run.save(visit, report, tuned)


def measure_block_influence(
    decoder: Decoder, batches: list[dict[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> list[float]:
    """Block influence of every block of the model as it is, by one walk that changes nothing."""
    inputs = capture_inputs(decoder, batches, device, dtype)
    return [visit.block_influence() for visit in walk(decoder, inputs, device, dtype)]
