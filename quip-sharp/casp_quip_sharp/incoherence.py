"""Incoherence: a weight and its Hessian in a basis in which no entry stands out (arXiv 2402.04396, section 3).

`W~ = U W V^T` and `H~ = V H V^T` with U, V = (orthogonal transform) x (random signs): `tr(D H D^T)` stays as it is, and
the entries of W~ look Gaussian, which is what the codebooks are made for. Only the signs are stored, a bit each; or,
once fine-tuning has moved them (section 5), a real vector in their place.
"""

import torch
from torch import Tensor

from casp.kernels import operators
from casp.moments.symmetric import panels
from casp_quip_sharp.hadamard import transform

_ROWS = 512  # of a moment that are rotated at once


def packed_signs(size: int) -> int:
    """Bytes that the signs of `size` coordinates take."""
    return -(-size // 8)


def random_signs(size: int, generator: torch.Generator | None = None) -> Tensor:
    """Random signs in packed form, (packed_signs(size),) uint8 on the CPU; bit i of byte j is coordinate 8 j + i.

    Drawn on the CPU, so that a seed means the same signs on every device. Bits beyond `size` are 0.
    """
    bits = torch.randint(0, 2, (size,), generator=generator, dtype=torch.uint8)
    padded = torch.nn.functional.pad(bits, (0, -size % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The signs as +1 and -1 (a bit that is set), (size,) in `dtype` on the device of `packed`."""
    if packed.device.type == "cpu" and dtype == torch.float32 and operators() is not None:
        return operators().unpack_signs(packed, size)
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return 1 - 2 * bits.flatten()[:size].to(dtype)


def rotate(x: Tensor, vector: Tensor) -> Tensor:
    """`T diag(vector) x` of the vectors x (..., n); vector (n,), the signs or what fine-tuning made of them."""
    return transform(x * vector)


def rotate_back(x: Tensor, vector: Tensor) -> Tensor:
    """`diag(vector) T^T x` of the vectors x (..., n): undoes `rotate` where the vector holds signs."""
    return transform(x, inverse=True) * vector


def incoherent_weight(weight: Tensor, out_vector: Tensor, in_vector: Tensor) -> Tensor:
    """`U W V^T` of `weight` (out, in)."""
    return rotate(rotate(weight, in_vector).T, out_vector).T


def original_weight(incoherent: Tensor, out_vector: Tensor, in_vector: Tensor) -> Tensor:
    """`U^T W~ V` of (out, in): undoes `incoherent_weight`."""
    return rotate_back(rotate_back(incoherent, in_vector).T, out_vector).T


def incoherent_hessian(hessian: Tensor, in_vector: Tensor) -> Tensor:
    """`V H V^T` of `hessian` (in, in), by blocks: a second matrix is held, no third."""
    rotated = torch.empty_like(hessian)
    for rows in panels(len(hessian), _ROWS):
        rotated[rows] = rotate(hessian[rows], in_vector)
    for columns in panels(len(hessian), _ROWS):
        rotated[:, columns] = rotate(rotated[:, columns].T, in_vector).T
    return rotated


def incoherence(matrix: Tensor) -> float:
    """`max |A_ij| sqrt(m n) / |A|_F` of a matrix (m, n): 1 for entries of one size, sqrt(m n) for a single entry."""
    return (matrix.abs().max() * matrix.numel() ** 0.5 / matrix.norm()).item()
