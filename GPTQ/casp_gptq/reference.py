"""GPTQ as the paper prints it and a sweep of descent, in float64, without blocks: what the fast ones equal."""

import torch
from torch import Tensor

from casp_gptq.gptq import Quantized
from casp_gptq.grid import find_grid, group_bounds, to_codes


def gptq_reference(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int = 128,
    *,
    symmetric: bool = False,
    act_order: bool = True,
    damping: float = 0.01,
    clip_steps: int = 20,
) -> Quantized:
    """Algorithm 1 of Frantar et al. 2022 (arXiv 2210.17323) with block size 1.

    weight (out, in), hessian (in, in), any float dtype; the other arguments are those of `gptq_quantize`, whose
    result this is without refinement.
    """
    w, h = weight.double().clone(), hessian.double().clone()
    columns = w.shape[1]
    dead = h.diagonal() == 0
    mean = h.diagonal()[~dead].mean() if not dead.all() else h.new_ones(())
    h += torch.diag(torch.where(dead, mean, 0.0) + damping * mean)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    inverse = torch.linalg.inv(h[order][:, order])
    upper = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
    importance = torch.empty(columns, dtype=torch.float64)
    importance[order] = upper.diagonal().square().reciprocal()

    bounds = group_bounds(columns, group_size)
    scales = torch.empty(len(w), len(bounds), dtype=torch.float64)
    zeros, codes = torch.empty_like(scales), torch.empty_like(w)

    def fit(group: int) -> None:
        first, last = bounds[group]
        scales[:, group], zeros[:, group] = find_grid(
            w[:, first:last], bits, symmetric, clip_steps, importance[first:last]
        )

    if act_order:
        for group in range(len(bounds)):
            fit(group)
    for i, j in enumerate(order.tolist()):
        group = j // bounds[0][1]
        if not act_order and j == bounds[group][0]:
            fit(group)
        codes[:, j] = to_codes(w[:, j], scales[:, group], zeros[:, group], bits)
        rounded = scales[:, group] * (codes[:, j] - zeros[:, group])
        error = (w[:, j] - rounded) / upper[i, i]
        w[:, order[i + 1 :]] -= error[:, None] * upper[i, i + 1 :]
    return Quantized(codes.to(torch.uint8), scales.to(torch.float16), zeros.to(torch.uint8), group_size=bounds[0][1])


def descend_reference(
    hessian: Tensor, codes: Tensor, gradient: Tensor, scales: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """One sweep, as `casp_gptq.refine.descend`, column by column: every move changes the whole gradient at once."""
    h, g, steps = hessian.double(), gradient.double().clone(), scales.double()
    found = codes.double().clone()
    for j in range(len(found)):
        best = (found[j] + g[j] / (h[j, j] * steps[j])).round().clamp(0, 2**bits - 1)
        g -= h[:, j : j + 1] * (steps[j] * (best - found[j]))
        found[j] = best
    return found.to(codes.dtype), g.to(gradient.dtype)
