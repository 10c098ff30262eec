"""Quantizing a decoder with any backend, block by block, as a plan of formats says."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from casp.backend import Backend, Matrix, quantized
from casp.budget import Plan
from casp.errors import UserError
from casp.factors import FACTORS, low_rank_module, quantized_factors
from casp.finetune.in_block import Training, tunable_tensors, tune_block
from casp.finetune.teacher import Teacher
from casp.linear import is_finite
from casp.model.capture import capture_inputs
from casp.model.decoder import Decoder
from casp.model.split import side_by_side
from casp.moments.forward import block_moments, token_weights
from casp.moments.store import BlockMoments, LinearMoments, Moments
from casp.plan.options import stored_shapes
from casp.run.notes import warnings_of
from casp.run.writer import RunFolder
from casp.seed import matrix_generator
from casp.walk import Visit, walk

_log = logging.getLogger(__name__)

_ROWS = 1024  # of a matrix whose error is told at once: copies of all of a wide one would be as large as its moment


def weighted_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """`tr(D H D^T) / tr(W H W^T)` with D = W - W': the share of the output's energy that is lost.

    Products are taken in float32, in units in which no weight is beyond 1, and added up in float64.
    """
    unit = weight.abs().max().item() or 1.0
    hessian = hessian.float()
    lost = energy = 0.0
    for w, other in zip(weight.split(_ROWS), approximation.split(_ROWS), strict=True):
        d = ((w - other) / unit).float()
        w = (w / unit).float()
        lost += ((d @ hessian) * d).sum(dtype=torch.float64).item()
        energy += ((w @ hessian) * w).sum(dtype=torch.float64).item()
    return lost / energy if energy > 0 else 0.0


@dataclass(frozen=True)
class Method:
    """How a decoder is quantized: everything but the model and its data.

    plan: path of every stored matrix -> its format; ranks: path of every linear that is to become low-rank -> its rank,
    the formats of its factors standing in the plan; settings: the backend's knobs of the search; true_sequential: each
    group of matrices that share an input sees what the quantized earlier ones of the block produce (one pass over
    the calibration data a group instead of one a block); block_training: fine-tune the block after each group
    (then always sequential), None to leave it; weighting: of the tokens (see `casp.moments.weights`), one of those by
    gradient only with moments collected before.
    """

    backend: Backend
    plan: Plan
    settings: Mapping[str, Any]
    seed: int = 0
    true_sequential: bool = True
    block_training: Training | None = None
    weighting: str = "none"
    ranks: Mapping[str, int] = field(default_factory=dict)


def _quantize_group(
    visit: Visit, paths: Sequence[str], prefix: str, hessian: Tensor, method: Method
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Quantize matrices that share an input, in place; path and report of each. prefix: the block's path."""
    backend = method.backend
    matrices = []
    for path in paths:
        name = f"{prefix}.{path}"
        weight = visit.block.get_submodule(path).weight.detach()
        matrices.append(Matrix(weight, method.plan[name], matrix_generator(method.seed, name), name))
    made = quantized(backend, matrices, hessian, method.settings)
    for path, one in zip(paths, matrices, strict=True):
        old = visit.block.get_submodule(path)
        with warnings_of("casp.moments") as notes:
            tensors = next(made)
        new = backend.linear(
            old.out_features,
            old.in_features,
            old.bias is not None,
            one.format,
            dtype=old.weight.dtype,
            device=visit.device,
        )
        spoilt = [name for name, tensor in tensors.items() if not is_finite(tensor)]
        if spoilt:
            raise UserError(
                f"{one.name}: its {spoilt[0]} would hold NaN or infinity, its weights are too large for the format; "
                "check the checkpoint."
            )
        if old.bias is not None:
            tensors = {**tensors, "bias": old.bias.detach()}
        new.load_state_dict(tensors)
        parent, _, leaf = path.rpartition(".")
        setattr(visit.block.get_submodule(parent), leaf, new)
        bits = 8 * backend.bytes(one.format, old.out_features, old.in_features) / one.weight.numel()
        yield (
            path,
            {
                "bits": round(bits, 4),
                "relative_error": weighted_error(one.weight.float(), new.dequantize().float(), hessian),
                **({"notes": notes} if notes else {}),
            },
        )


def _quantize_factors(
    visit: Visit, path: str, full_path: str, moments: LinearMoments, method: Method, role: str
) -> dict[str, dict[str, float]]:
    """Low rank and both factors quantized, in place; the reports of the linear and of its factors, by role."""
    old, backend, rank = visit.block.get_submodule(path), method.backend, method.ranks[full_path]
    formats = [method.plan[f"{full_path}.{which}"] for which in FACTORS]
    weight, hessian = old.weight.detach().float(), moments.hessian(method.weighting).to(visit.device)
    with warnings_of("casp") as notes:
        gradients = moments.gradient_moment
        if gradients is None:
            _log.warning("%s: low-rank by what enters it alone, its gradients' covariance is not collected", full_path)
            gradients = torch.eye(len(weight))
        made = quantized_factors(
            weight, hessian, gradients.to(visit.device), rank, formats, backend, method.seed, full_path, method.settings
        )
    parent, _, leaf = path.rpartition(".")
    setattr(visit.block.get_submodule(parent), leaf, low_rank_module(old, rank, formats, backend, made))
    shapes = stored_shapes(rank, *weight.shape)
    sizes = [backend.bytes(format, *shape) for format, shape in zip(formats, shapes, strict=True)]
    errors = (
        weighted_error(made.wanted_down, made.down, made.moment),
        weighted_error(made.wanted_up, made.up, made.inner_moment),
    )
    report = {
        f"{role}.{which}": {"bits": round(8 * size / (rows * columns), 4), "relative_error": error}
        for which, size, (rows, columns), error in zip(FACTORS, sizes, shapes, errors, strict=True)
    }
    whole = {
        "rank": rank,
        "bits": round(8 * sum(sizes) / weight.numel(), 4),
        "relative_error": weighted_error(weight, made.dense(), hessian),
        **({"notes": notes} if notes else {}),
    }
    return {role: whole, **report}


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
        for group, seen in zip(stage, shared, strict=True):
            whole = [path for path in group if f"{prefix}.{path}" not in method.ranks]
            for path in [path for path in group if path not in whole]:
                linears |= _quantize_factors(visit, path, f"{prefix}.{path}", moments[path], method, roles[path])
            for paths in [whole] if moments is None else moments.sharing(whole, method.weighting):
                hessian = seen if moments is None else moments[paths[0]].hessian(method.weighting).to(visit.device)
                for path, report in _quantize_group(visit, paths, prefix, hessian, method):
                    linears[roles[path]] = report
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
