"""The matrices of a block from dense to quantized, each by one of the ranks that visit the block together.

Ranks share them out by what their feedback multiplies. What one makes of a matrix, packed tensors and a report, travels
once, and all put the same module in its place: the bytes of one process, which makes them all.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from casp.backend import Backend, Matrix, quantized
from casp.budget import Plan
from casp.errors import UserError
from casp.factors import FACTORS, low_rank_module, quantized_factors
from casp.finetune.in_block import Training
from casp.linear import is_finite
from casp.moments.store import LinearMoments
from casp.plan.options import stored_shapes
from casp.ranks import Message
from casp.run.notes import warnings_of
from casp.seed import matrix_generator
from casp.walk import Visit

_log = logging.getLogger(__name__)
_ROWS = 1024  # of a matrix whose error is told at once: copies of all of a wide one would be as large as its moment
_TOLD = 2048  # most rows of a matrix whose error the report tells: of all it takes a third of GPTQ's products


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


def told_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> dict[str, float | int]:
    """`weighted_error` as reports tell it: of at most `_TOLD` rows, evenly spread; "error_rows" counts a part."""
    every = -(-len(weight) // _TOLD)
    rows = weight[::every]
    error = weighted_error(rows.float(), approximation[::every].float(), hessian)
    return {"relative_error": error, **({"error_rows": len(rows)} if every > 1 else {})}


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


@dataclass(frozen=True)
class Made:
    """What became of one linear: the tensors of the module in its place, a bias left out, and its reports by role."""

    tensors: dict[str, Tensor]
    report: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Work:
    """Linears of one block that are rounded under one moment: `paths` relative to it, `roles` likewise.

    hessian: reads the moment (in, in), where it is needed; moments: of the one linear that becomes low-rank, else None.
    """

    paths: Sequence[str]
    roles: Sequence[str]
    hessian: Callable[[], Tensor] | None = None
    moments: LinearMoments | None = None

    def costs(self, block: nn.Module) -> list[float]:
        """What the feedback of each multiplies."""
        linears = (block.get_submodule(path) for path in self.paths)
        return [float(linear.out_features * linear.in_features**2) for linear in linears]


def _module(old: nn.Module, name: str, method: Method, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module of `tensors` that stands in for the linear `old`, called `name`."""
    backend = method.backend
    if name in method.ranks:
        formats = [method.plan[f"{name}.{which}"] for which in FACTORS]
        stored = [
            {key.removeprefix(f"{which}."): one for key, one in tensors.items() if key.startswith(f"{which}.")}
            for which in FACTORS
        ]
        return low_rank_module(old, method.ranks[name], formats, backend, stored)
    has_bias, dtype, device = old.bias is not None, old.weight.dtype, old.weight.device
    new = backend.linear(old.out_features, old.in_features, has_bias, method.plan[name], dtype=dtype, device=device)
    new.load_state_dict({**tensors, "bias": old.bias.detach()} if has_bias else tensors)
    return new


def _put(block: nn.Module, path: str, name: str, method: Method, tensors: Mapping[str, Tensor]) -> nn.Module:
    parent, _, leaf = path.rpartition(".")
    new = _module(block.get_submodule(path), name, method, tensors)
    setattr(block.get_submodule(parent), leaf, new)
    return new


def _whole(visit: Visit, work: Work, prefix: str, method: Method, mine: Sequence[int]) -> Iterator[Made]:
    """Quantize those numbered `mine` of matrices that share an input, in place."""
    backend, hessian = method.backend, work.hessian()
    matrices = []
    for path in work.paths:
        name = f"{prefix}.{path}"
        weight = visit.block.get_submodule(path).weight.detach()
        matrices.append(Matrix(weight, method.plan[name], matrix_generator(method.seed, name), name))
    made = quantized(backend, matrices, hessian, method.settings, mine)
    for number in mine:
        one, path = matrices[number], work.paths[number]
        with warnings_of("casp.moments") as notes:
            tensors = next(made)
        spoilt = [name for name, tensor in tensors.items() if not is_finite(tensor)]
        if spoilt:
            raise UserError(
                f"{one.name}: its {spoilt[0]} would hold NaN or infinity, its weights are too large for the format; "
                "check the checkpoint."
            )
        new = _put(visit.block, path, one.name, method, tensors)
        report = {
            "bits": round(8 * backend.bytes(one.format, *one.weight.shape) / one.weight.numel(), 4),
            **told_error(one.weight, new.dequantize(), hessian),
            **({"notes": notes} if notes else {}),
        }
        yield Made(tensors, {work.roles[number]: report})


def _low_rank(visit: Visit, work: Work, prefix: str, method: Method) -> Made:
    """Low rank and both factors quantized, in place; the reports of the linear and of its factors."""
    (path,), (role,) = work.paths, work.roles
    name = f"{prefix}.{path}"
    old, backend, rank = visit.block.get_submodule(path), method.backend, method.ranks[name]
    formats = [method.plan[f"{name}.{which}"] for which in FACTORS]
    weight, hessian = old.weight.detach().float(), work.moments.hessian(method.weighting).to(visit.device)
    with warnings_of("casp") as notes:
        gradients = work.moments.gradient_moment
        if gradients is None:
            _log.warning("%s: low-rank by what enters it alone, its gradients' covariance is not collected", name)
            gradients = torch.eye(len(weight))
        gradients = gradients.to(visit.device)
        made = quantized_factors(weight, hessian, gradients, rank, formats, backend, method.seed, name, method.settings)
    stored = dict(zip(FACTORS, (made.stored_down, made.stored_up), strict=True))
    tensors = {f"{which}.{key}": one for which, named in stored.items() for key, one in named.items()}
    _put(visit.block, path, name, method, tensors)
    shapes = stored_shapes(rank, *weight.shape)
    sizes = [backend.bytes(format, *shape) for format, shape in zip(formats, shapes, strict=True)]
    errors = (
        told_error(made.wanted_down, made.down, made.moment),
        told_error(made.wanted_up, made.up, made.inner_moment),
    )
    report = {
        f"{role}.{which}": {"bits": round(8 * size / (rows * columns), 4), **error}
        for which, size, (rows, columns), error in zip(FACTORS, sizes, shapes, errors, strict=True)
    }
    whole = {
        "rank": rank,
        "bits": round(8 * sum(sizes) / weight.numel(), 4),
        **told_error(weight, made.dense(), hessian),
        **({"notes": notes} if notes else {}),
    }
    return Made(tensors, {role: whole, **report})


def _made(visit: Visit, work: Work, prefix: str, method: Method, mine: Sequence[int]) -> Iterator[Made]:
    if not mine:
        return
    if work.moments is not None:
        yield _low_rank(visit, work, prefix, method)
    else:
        yield from _whole(visit, work, prefix, method, mine)


def round_all(visit: Visit, works: Sequence[Work], prefix: str, method: Method) -> dict[str, dict[str, Any]]:
    """Round all linears of `works`, no two of which depend on each other, in place; their reports by role.

    prefix: the block's path. The ranks that visit it share them out.
    """
    ranks = visit.ranks
    places = [(work, number) for work in works for number in range(len(work.paths))]
    owners = ranks.owners([cost for work in works for cost in work.costs(visit.block)])
    found: dict[int, Made] = {}
    start = 0
    for work in works:
        mine = [number for number in range(len(work.paths)) if owners[start + number] == ranks.rank]
        made = _made(visit, work, prefix, method, mine)
        found |= {start + number: one for number, one in zip(mine, made, strict=True)}
        start += len(work.paths)
    ranks.did("matrices", len(found))
    reports: dict[str, dict[str, Any]] = {}
    for place, ((work, number), owner) in enumerate(zip(places, owners, strict=True)):
        one = found.get(place)
        if ranks.size > 1:
            message = None if one is None else Message([one.report, list(one.tensors)], list(one.tensors.values()))
            told = ranks.everywhere(message, owner)
            report, names = told.header
            if one is None:
                path = work.paths[number]
                tensors = dict(zip(names, told.tensors, strict=True))
                _put(visit.block, path, f"{prefix}.{path}", method, tensors)
        else:
            report = one.report
        reports |= report
    return reports
