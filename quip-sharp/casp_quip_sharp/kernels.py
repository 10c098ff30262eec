"""The product of activations and codes, `x P^T`, and the whole layer around it, as kernels of `casp.kernels`.

A codebook's product decodes P in plain PyTorch and multiplies, or has an operator of quiptools that multiplies up to 16
vectors straight from the codes; for more, it decodes in tiles and leaves the product to the matrix library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from casp.kernels import has_operator, multiplies_natively, run, warn_of_plain_pytorch
from casp_quip_sharp.codebooks import STAGES, UNIT, decode, half_patterns, odd_negatives, table
from casp_quip_sharp.hadamard import factors, has_kernel, transform_plan

# The product before the scale is some 30 times the output: float16 would overflow where outputs are large.
_HEADROOM = 32
Arguments = tuple[object, ...]


def decoded(codes: Tensor, residual_codes: Tensor | None, bits: int) -> Tensor:
    """P, what the codes (out, in / 8) stand for in units of the scale: (out, in) float32."""
    stages = STAGES[bits]
    points = decode(codes, stages[0])
    if residual_codes is not None:
        points += decode(residual_codes, stages[1])
    return points.view(len(codes), -1)


def multiply(x: Tensor, points: Tensor, dtype: torch.dtype) -> Tensor:
    """`x points^T` with factors rounded to `dtype`, float32."""
    if dtype == torch.float32:
        return F.linear(x, points)
    return F.linear((x / _HEADROOM).to(dtype), points.to(dtype)).float() * _HEADROOM


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """What the kernels look up, (256, 8) float32 both: patterns, with the sign that parity asks for, and E8 points."""
    patterns = half_patterns().copy()
    patterns[odd_negatives(patterns), -1] *= -1
    return torch.from_numpy(patterns).to(device, torch.float32), table("e8", device).float() * UNIT


def e8p_coding(bits: int, device: torch.device) -> Arguments:
    """What codes of E8 mean, for the operators of quiptools."""
    return *_tables(device), STAGES[bits][-1].scale


def e8p_arguments(codes: Tensor, residual_codes: Tensor | None, bits: int) -> Arguments:
    """What every operator of quiptools takes to know a matrix of E8 codes."""
    return codes, residual_codes, *e8p_coding(bits, codes.device)


@dataclass(frozen=True)
class Product:
    """`x P^T`, (vectors, out) float32, of x (vectors, in) float32; factors may be rounded to `dtype`.

    operator: of quiptools; matrix: its arguments that describe P; points: P itself, (out, in) float32.
    """

    operator: str
    matrix: Arguments
    points: Callable[[], Tensor]
    dtype: torch.dtype
    trains: bool = False

    def fits(self, x: Tensor) -> bool:
        """See `Kernel`."""
        return True

    def arguments(self) -> Arguments:
        """See `Kernel`."""
        on_cpu = self.matrix[0].device.type == "cpu"
        return *self.matrix, torch.float32 if on_cpu and not multiplies_natively(self.dtype) else self.dtype

    def reference(self, x: Tensor) -> Tensor:
        """See `Kernel`."""
        return multiply(x, self.points(), self.dtype)


def e8p_product(codes: Tensor, residual_codes: Tensor | None, bits: int, dtype: torch.dtype) -> Product:
    """The product with a matrix of E8 codes: (out, in / 8), int16 or at 1 bit uint8; residual_codes at 3 and 4 bits."""
    matrix = e8p_arguments(codes, residual_codes, bits)
    return Product("product", matrix, lambda: decoded(codes, residual_codes, bits), dtype)


def multiply_codes(x: Tensor, product: Product, out_features: int) -> Tensor:
    """`x P^T`, (..., out) float32, by the fastest implementation; a warning says once where there is only the plain."""
    vectors = x.reshape(-1, x.shape[-1])
    if not has_operator(product.operator, x.device.type):
        warn_of_plain_pytorch(x.device.type)
    return run(product, vectors).view(*x.shape[:-1], out_features)


@dataclass(frozen=True)
class Constants:
    """What a layer's operator takes besides the layer's own tensors; made once, not in every call.

    coding: what the codes mean; into, back: the dense factors and the power of two of the transforms of both sides;
    has_transforms: whether quiptools has them; device: where the tensors are.
    """

    coding: Arguments
    into: Arguments
    back: Arguments
    has_transforms: bool
    device: torch.device

    def __deepcopy__(self, memo: dict[int, object]) -> "Constants":
        return self  # never changed, and shared by all layers of a shape


def layer_constants(coding: Arguments, columns: int, rows: int, device: torch.device) -> Constants:
    """The constants of a layer of `columns` padded inputs and `rows` outputs."""
    into, back = transform_plan(columns), transform_plan(rows)
    sides = (factors(into, False, device), into.power), (factors(back, True, device), back.power)
    return Constants(coding, *sides, has_kernel(into) and has_kernel(back), device)


@dataclass(frozen=True)
class Layer:
    """`y = U^T W~ V x + b`, x (..., in) and y (..., out) of x's dtype, in one operator.

    operator, matrix: as of `Product`; in_vector, out_vector: packed signs (uint8) or floats, of the padded inputs and
    of the outputs; scale: multiplies out_vector, None for 1; plain: the whole in PyTorch.
    """

    operator: str
    matrix: Arguments
    in_vector: Tensor
    out_vector: Tensor
    scale: Tensor | None
    bias: Tensor | None
    constants: Constants
    dtype: torch.dtype
    plain: Callable[[Tensor], Tensor]

    @property
    def trains(self) -> bool:
        """See `Kernel`."""
        tensors = (self.in_vector, self.out_vector, self.scale, self.bias)
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)

    def fits(self, x: Tensor) -> bool:
        """Where quiptools has the transforms of both sides."""
        return self.constants.has_transforms

    def arguments(self) -> Arguments:
        """See `Kernel`."""
        into, back = self.constants.into, self.constants.back
        half = multiplies_natively(self.dtype)
        return *self.matrix, self.in_vector, *into, self.out_vector, *back, self.scale, self.bias, half

    def reference(self, x: Tensor) -> Tensor:
        """See `Kernel`."""
        return self.plain(x)
