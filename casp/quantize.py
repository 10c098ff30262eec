"""Quantizing a decoder with any backend, block by block, as a plan of formats says."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from casp.backend import Backend
from casp.budget import Plan
from casp.errors import UserError
from casp.hessians import Hessians, Weighting, block_moments, token_weights
from casp.models import Decoder
from casp.notes import warnings_of
from casp.run import RunFolder
from casp.teacher import Teacher
from casp.tuning import Training, tunable_tensors, tune_block
from casp.walk import Visit, capture_inputs, walk


def matrix_generator(seed: int, path: str) -> torch.Generator:
    """The generator of one matrix: it depends on the seed and the path, not on what was done before."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def weighted_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """`tr(D H D^T) / tr(W H W^T)` with D = W - W': the share of the output's energy that is lost."""
    w, d, h = weight.double(), (weight - approximation).double(), hessian.double()
    energy = ((w @ h) * w).sum().item()
    return ((d @ h) * d).sum().item() / energy if energy > 0 else 0.0


@dataclass(frozen=True)
class Method:
    """How a decoder is quantized: everything but the model and its data.

    plan: path of every stored matrix -> its format; settings: the backend's knobs of the search; true_sequential: each
    group of matrices that share an input sees what the quantized earlier ones of the block produce (one pass over
    the calibration data a group instead of one a block); block_training: fine-tune the block after each group
    (then always sequential), None to leave it; weighting: of the tokens, where second moments are collected here.
    """

    backend: Backend
    plan: Plan
    settings: Mapping[str, Any]
    seed: int = 0
    true_sequential: bool = True
    block_training: Training | None = None
    weighting: Weighting | None = None


def _quantize_matrix(
    visit: Visit,
    path: str,
    full_path: str,
    hessian: Tensor,
    method: Method,
) -> dict[str, Any]:
    old, backend = visit.block.get_submodule(path), method.backend
    format = method.plan[full_path]
    weight = old.weight.detach().float()
    generator = matrix_generator(method.seed, full_path)
    with warnings_of("casp.moments") as notes:
        tensors = backend.quantize(weight, hessian, format, generator, name=full_path, **method.settings)
    new = backend.linear(
        old.out_features,
        old.in_features,
        old.bias is not None,
        format,
        dtype=old.weight.dtype,
        device=visit.device,
    )
    spoilt = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if spoilt:
        raise UserError(
            f"{full_path}: its {spoilt[0]} would hold NaN or infinity, its weights are too large for the format; check "
            "the checkpoint."
        )
    if old.bias is not None:
        tensors = {**tensors, "bias": old.bias.detach()}
    new.load_state_dict(tensors)
    parent, _, leaf = path.rpartition(".")
    setattr(visit.block.get_submodule(parent), leaf, new)
    bits = 8 * backend.bytes(format, old.out_features, old.in_features) / weight.numel()
    return {
        "bits": round(bits, 4),
        "relative_error": weighted_error(weight, new.dequantize().float(), hessian),
        **({"notes": notes} if notes else {}),
    }


def quantize_block(
    visit: Visit,
    decoder: Decoder,
    method: Method,
    hessians: list[tuple[list[str], Tensor]] | None = None,
    targets: list[Tensor] | None = None,
) -> dict[str, Any]:
    """Quantize every matrix of one block in place; returns its report: bits and error by role, curves of tuning.

    hessians: groups of matrices with their input's second moment, collected before; None: collected here.
    targets: what the block should put out, per batch, for `method.block_training`.
    """
    roles = {path: role for role, path in decoder.linears(visit.index, factors=True).items()}
    groups = [group for group, _ in hessians] if hessians else visit.input_groups(list(roles))
    one_by_one = method.true_sequential or method.block_training is not None
    weights = None if hessians else token_weights(visit, method.weighting)
    generator = matrix_generator(method.seed, f"{decoder.blocks[visit.index]} tuning")
    linears: dict[str, dict[str, Any]] = {}
    tuning = []
    for stage in [[group] for group in groups] if one_by_one else [groups]:
        if hessians is None:
            moments = block_moments(visit, stage, weights)
        else:
            moments = [moment.to(visit.device) for group, moment in hessians if group in stage]
        for group, hessian in zip(stage, moments, strict=True):
            for path in group:
                full_path = f"{decoder.blocks[visit.index]}.{path}"
                linears[roles[path]] = _quantize_matrix(visit, path, full_path, hessian, method)
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
    hessians: Hessians | None = None,
    teacher: Teacher | None = None,
) -> None:
    """Quantize all blocks into `run`; finished blocks of an earlier attempt are taken as they are.

    hessians: collected before; teacher: the original model on the same batches, for block fine-tuning. With the first
    and without the second no data is run through the model.
    """
    needs_data = hessians is None or method.block_training is not None
    for visit in run.walk(batches if needs_data else None, device, dtype):
        known = None
        if hessians is not None:
            paths = decoder.linears(visit.index, factors=True).values()
            known = hessians.read(visit.index, {path: visit.block.get_submodule(path).in_features for path in paths})
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
