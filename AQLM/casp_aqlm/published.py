"""The published algorithm, step by step in float64: what the search of this room is compared with.

Egiazarian et al. 2024, arXiv 2401.06118, section 3 and algorithm 1, with the defaults of its code: a row's scale is its
norm, residual k-means of the scaled weights, then epochs of 100 steps of Adam on codebooks and scales and one search of
the codes (beam 1: each code in turn becomes the best one given all others), until an epoch gains less than 1%. Groups
are searched in random order. The product of error and H is made anew for every group and codebook, as it is there.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from casp_aqlm.linear import decode
from casp_aqlm.nearest import entries_reference
from casp_aqlm.quantize import Additive
from casp_aqlm.scheme import Scheme

INIT_ITERATIONS, EPOCH_STEPS, LEARNING_RATE, TOLERANCE = 100, 100, 1e-4, 0.01
_EPSILON = 1e-9  # keeps the scale of a row of zeros off 0


def residual_k_means(
    vectors: Tensor, scheme: Scheme, generator: torch.Generator, iterations: int = INIT_ITERATIONS
) -> tuple[Tensor, Tensor]:
    """Codebooks (M, 2^B, g) and codes (vectors, M), each codebook fitted to what those before it leave."""
    codebooks, codes, left = [], [], vectors
    for _ in range(scheme.codebooks):
        chosen = torch.randperm(len(left), generator=generator)[: scheme.size]
        entries = left[chosen.repeat(-(-scheme.size // len(chosen)))[: scheme.size]]
        for _ in range(iterations):
            code = entries_reference(left, entries)
            count = torch.bincount(code, minlength=scheme.size)[:, None]
            means = torch.zeros_like(entries).index_add(0, code, left) / count.clamp_min(1)
            moved = torch.where(count > 0, means, entries)
            if torch.equal(moved, entries):
                break
            entries = moved
        codes.append(entries_reference(left, entries))
        codebooks.append(entries)
        left = left - entries[codes[-1]]
    return torch.stack(codebooks), torch.stack(codes, 1)


def search_codes(
    weight: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, hessian: Tensor, order: Sequence[int]
) -> Tensor:
    """One pass over the groups in `order`, their codebooks one by one: each code becomes the best given all others.

    weight: (rows, n); codes: (rows, groups, M); hessian: (n, n); any dtype, float64 to be exact. Returns new codes.
    """
    codes, group = codes.clone(), codebooks.shape[-1]
    for k in order:
        at = slice(k * group, (k + 1) * group)
        for place, codebook in enumerate(codebooks):
            error = weight - decode(codes, codebooks) * scales[:, None]
            pull = (error @ hessian[:, at]) / scales[:, None]
            old, corner = codebook[codes[:, k, place]], hessian[at, at]
            # |old - new|_H^2 + 2 pull (old - new), the loss in units of the scale, but for what no entry changes
            linear = (pull + old @ corner) @ codebook.T
            loss = ((codebook @ corner) * codebook).sum(1) - 2 * linear
            codes[:, k, place] = loss.argmin(1)
    return codes


def published_aqlm(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    generator: torch.Generator,
    *,
    max_epochs: int = 1000,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[float, float], None] = lambda seconds, loss: None,
) -> Additive:
    """The published algorithm on `weight` (out, in) under `hessian` (in, in), both taken as float64.

    It ends at its own criterion, after `max_epochs`, or at the end of the first epoch beyond `seconds` of `clock`.
    progress is called with the seconds so far and the relative loss after each step of the history.
    """
    began, weight, hessian = clock(), weight.double(), hessian.double()
    energy = ((weight @ hessian) * weight).sum().item()
    scales = weight.norm(dim=1) + _EPSILON
    codebooks, codes = residual_k_means((weight / scales[:, None]).view(-1, scheme.group), scheme, generator)
    state = Additive(codes.view(len(weight), -1, scheme.codebooks), codebooks, scales)
    codebooks, scales = codebooks.clone().requires_grad_(), scales.clone().requires_grad_()
    optimizer = torch.optim.Adam([codebooks, scales], lr=LEARNING_RATE, betas=(0.0, 0.95), amsgrad=True)

    def loss() -> Tensor:
        error = weight - decode(state.codes, codebooks) * scales[:, None]
        return ((error @ hessian) * error).sum()

    def record() -> float:
        with torch.no_grad():
            found = loss().item() / energy
        state.history.append((clock() - began, found))
        progress(*state.history[-1])
        return found

    best = float("inf")
    for _ in range(max_epochs):
        now = record()
        if now > (1 - TOLERANCE) * best or clock() - began > seconds:
            break
        best = min(best, now)
        with torch.enable_grad():
            for _ in range(EPOCH_STEPS):
                optimizer.zero_grad()
                (loss() / len(weight)).backward()
                optimizer.step()
        record()
        order = torch.randperm(state.codes.shape[1], generator=generator).tolist()
        state.codes = search_codes(weight, state.codes, codebooks.detach(), scales.detach(), hessian, order)
    else:
        record()
    state.codebooks, state.scales = codebooks.detach(), scales.detach()
    return state
