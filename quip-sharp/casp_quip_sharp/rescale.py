"""Scales of the columns before the rotation, which a format with real vectors stores at no cost.

`W x = (W S)(S^-1 x)` for every diagonal S, so the rounding may happen on W S under S^-1 H S^-1, and S^-1 goes into the
vector that multiplies the inputs. With c_i the norm of column i and d_i = H_ii:

- where rounding errors are fine, LDLQ's error is proportional to `|W S|_F^2 / det(S)^(2/n)`: least for s_i = 1 / c_i;
- where they are coarse, what feedback does not make good counts, `tr(S^-1 H S^-1) |W S|_F^2`: least for
  s_i = (d_i / c_i^2)^(1/4), the rescaling of QuIP (Chee et al. 2023, arXiv 2307.13304, section 4.2).

Neither is best everywhere at 2 bits, and both can harm where H is nearly singular; so a few `d^a c^-b` between them and
none at all are compared on a sample of rows.
"""

import torch
from torch import Tensor

POWERS = ((0.0, 0.0), (0.0, 0.5), (0.125, 0.25), (0.1, 0.75))
"""(a, b) of the scales `d^a c^-b` that are compared."""

_LEAST = 1e-6  # of the mean: a column that is never used, or holds zeros, does not get a boundless scale


def column_scales(weight: Tensor, hessian: Tensor, powers: tuple[float, float]) -> Tensor:
    """`d^a c^-b` of `weight` (out, in) and `hessian` (in, in), scaled to geometric mean 1: (in,) float64."""
    tiny = torch.finfo(torch.float64).tiny
    of_input, of_norm = powers
    squares = weight.double().square().sum(0)
    used, norms = (x.clamp_min(max(_LEAST * x.mean().item(), tiny)) for x in (hessian.diagonal().double(), squares))
    logs = of_input * used.log() - of_norm * norms.log() / 2
    return (logs - logs.mean()).exp()
