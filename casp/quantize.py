"""Quantizing a decoder with any backend, block by block, as a plan of formats says."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from casp.backend import Backend
from casp.budget import Plan
from casp.models import Decoder
from casp.moments import SecondMoment
from casp.run import RunFolder
from casp.walk import BatchInputs, Visit, capture_inputs, walk


def matrix_generator(seed: int, path: str) -> torch.Generator:
    """The generator of one matrix: it depends on the seed and the path, not on what was done before."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def input_moments(visit: Visit, groups: list[list[str]]) -> list[Tensor]:
    """The second moment of each group's shared input, (in, in), over all tokens that are not padding."""
    moments: list[SecondMoment] = []
    observers = {}
    for group in groups:
        moment = SecondMoment(visit.block.get_submodule(group[0]).in_features, device=visit.device)

        def see(x: Tensor, batch: BatchInputs, moment: SecondMoment = moment) -> None:
            moment.add(x[batch.tokens])

        moments.append(moment)
        observers[group[0]] = see
    visit.replay(observers)
    return [moment.value() for moment in moments]


def weighted_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """`tr(D H D^T) / tr(W H W^T)` with D = W - W': the share of the output's energy that is lost."""
    w, d, h = weight.double(), (weight - approximation).double(), hessian.double()
    energy = ((w @ h) * w).sum().item()
    return ((d @ h) * d).sum().item() / energy if energy > 0 else 0.0


def _quantize_matrix(
    visit: Visit,
    path: str,
    full_path: str,
    hessian: Tensor,
    backend: Backend,
    plan: Plan,
    seed: int,
    settings: dict,
) -> dict[str, float]:
    old = visit.block.get_submodule(path)
    format = plan[full_path]
    weight = old.weight.detach().float()
    generator = matrix_generator(seed, full_path)
    tensors = backend.quantize(weight, hessian, format, generator, name=full_path, **settings)
    new = backend.linear(
        old.out_features,
        old.in_features,
        old.bias is not None,
        format,
        dtype=old.weight.dtype,
        device=visit.device,
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
    }


def quantize_block(
    visit: Visit,
    decoder: Decoder,
    backend: Backend,
    plan: Plan,
    seed: int,
    true_sequential: bool,
    settings: dict[str, Any],
) -> dict[str, dict[str, float]]:
    """Quantize every matrix of one block in place; returns bits and relative error by role.

    true_sequential: each group of matrices that share an input sees what the quantized earlier ones of the
    block produce (four passes a block instead of one).
    """
    roles = {path: role for role, path in decoder.linears(visit.index, factors=True).items()}
    groups = visit.input_groups(list(roles))
    report: dict[str, dict[str, float]] = {}
    for stage in [[group] for group in groups] if true_sequential else [groups]:
        for group, hessian in zip(stage, input_moments(visit, stage), strict=True):
            for path in group:
                full_path = f"{decoder.blocks[visit.index]}.{path}"
                report[roles[path]] = _quantize_matrix(visit, path, full_path, hessian, backend, plan, seed, settings)
    return report


def quantize_model(
    decoder: Decoder,
    run: RunFolder,
    batches: list[dict[str, Tensor]],
    backend: Backend,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    true_sequential: bool = True,
    settings: dict[str, Any] | None = None,
) -> None:
    """Quantize the whole decoder into `run`; finished blocks of an earlier attempt are taken as they are."""
    for visit in run.walk(batches, device, dtype):
        linears = quantize_block(visit, decoder, backend, plan, seed, true_sequential, settings or {})
        run.save(visit, {"linears": linears})
    run.finish()


def measure_block_influence(
    decoder: Decoder, batches: list[dict[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> list[float]:
    """Block influence of every block of the model as it is, by one walk that changes nothing."""
    inputs = capture_inputs(decoder, batches, device, dtype)
    return [visit.block_influence() for visit in walk(decoder, inputs, device, dtype)]
