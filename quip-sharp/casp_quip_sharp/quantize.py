"""One weight matrix from floats to QuIP#'s tensors: incoherence, scale, LDLQ, sweeps."""

import torch
from torch import Tensor
from torch.nn import functional as F

from casp.errors import UserError
from casp_quip_sharp.codebooks import GAUSSIAN_SCALE
from casp_quip_sharp.incoherence import incoherent_hessian, incoherent_weight, random_signs, unpack_signs
from casp_quip_sharp.ldlq import Factors, block_ldl, descend, ldlq, weighted_loss
from casp_quip_sharp.linear import CODE_NAMES, padded

_SAMPLED_ROWS = 64  # rows on which scales are compared; after the rotation all rows are alike
_SCALE_FACTORS = (0.9, 0.95, 1.0, 1.05, 1.1, 1.15)


def storable(scale: float) -> float:
    """`scale` rounded to eight significant bits: float32, bfloat16 and (from 6e-5 up) float16 hold it exactly."""
    return torch.tensor(scale).to(torch.bfloat16).item()


def gaussian_scale(weight: Tensor, bits: int) -> float:
    """The scale that is best for Gaussian entries without feedback; 0 for a matrix of zeros."""
    return storable(weight.square().mean().sqrt().item() * GAUSSIAN_SCALE[bits])


def choose_scale(weight: Tensor, factors: Factors, bits: int) -> float:
    """The scale of least weighted loss on a sample of the rows of `weight` (out, in), already incoherent."""
    base = gaussian_scale(weight, bits)
    if base == 0:
        return base
    sample = weight[:: max(len(weight) // _SAMPLED_ROWS, 1)]
    scales = [storable(base * factor) for factor in _SCALE_FACTORS]
    together = ldlq(torch.cat([sample / scale for scale in scales]), factors, bits).points.chunk(len(scales))
    losses = [
        weighted_loss(sample - scale * points, factors.hessian) for scale, points in zip(scales, together, strict=True)
    ]
    return scales[losses.index(min(losses))]


def quantize_matrix(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    generator: torch.Generator | None = None,
    *,
    tuned: bool = False,
    damping: float = 0.01,
    search_scale: bool = True,
    sweeps: int = 2,
    name: str = "weight",
) -> dict[str, Tensor]:
    """Quantize `weight` (out, in) under `hessian` = E[x x^T] (in, in), minimising `tr(E H E^T)`.

    bits: 1, 2, 3 or 4; generator: draws the signs. tuned: return the signs as the real
    vectors that fine-tuning starts from. damping: share of the mean diagonal added to the diagonal of
    `hessian`. search_scale: compare scales under the weighted loss instead of taking the Gaussian's. sweeps: rounds
    of coordinate descent after LDLQ. name: the layer, for messages.

    Works in float32 on the device of `weight`, factoring in float64. Returns the tensors of a `QuipSharpLinear`.
    UserError when something is not finite or the shapes do not match.
    """
    rows, columns = weight.shape
    if not torch.isfinite(weight).all():
        raise UserError(f"{name}: its weight holds NaN or infinity; download or write the checkpoint again.")
    if hessian.shape != (columns, columns):
        raise UserError(
            f"{name}: a Hessian of shape {tuple(hessian.shape)} does not fit a weight of {columns} columns; "
            "take both from the same layer."
        )
    device, extra = weight.device, padded(columns) - columns
    out_signs = random_signs(rows, generator).to(device)
    in_signs = random_signs(columns + extra, generator).to(device)
    out_vector, in_vector = unpack_signs(out_signs, rows), unpack_signs(in_signs, columns + extra)
    incoherent = incoherent_weight(F.pad(weight.float(), (0, extra)), out_vector, in_vector)
    moved = incoherent_hessian(F.pad(hessian.to(device, torch.float64), (0, extra, 0, extra)), in_vector.double())
    factors = block_ldl(moved, damping, name)

    scale = choose_scale(incoherent, factors, bits) if search_scale else gaussian_scale(incoherent, bits)
    target = incoherent / scale if scale else incoherent
    rounded = ldlq(target, factors, bits)
    for _ in range(sweeps):
        rounded = descend(target, factors, rounded, bits)
    codes = dict(zip(CODE_NAMES, rounded.codes, strict=False))
    if tuned:
        return {
            **codes,
            "out_vector": (out_vector * scale).to(torch.bfloat16),
            "in_vector": in_vector.to(torch.bfloat16),
        }
    return {
        **codes,
        "out_signs": out_signs,
        "in_signs": in_signs,
        "scale": torch.tensor(scale, dtype=torch.float32, device=device),
    }
