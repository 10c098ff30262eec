"""An orthogonal transform with small entries for any width n, in O(n log n).

QuIP# (Tseng et al. 2024, arXiv 2402.04396, section 3) mixes weights by Hadamard matrices. One of order n exists only
for n = 1, 2 and multiples of 4, so n is written as a product and the transform is the Kronecker product of

- Hadamard matrices of small order (`casp_quip_sharp.orders`), for as much of n as possible,
- Sylvester's matrix for the rest of the powers of two,
- and, only where no Hadamard order fits, Hartley's real Fourier transform of the odd rest m:
  `cos(2 pi i j / m) + sin(2 pi i j / m)` over `sqrt(m)`. It is orthogonal for every m, no entry exceeds
  `sqrt(2 / m)` (a Hadamard matrix has `sqrt(1 / m)`), and it is the same on every machine without a stored matrix
  or a seed; large m goes through the FFT.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import prod

import numpy as np
import torch
from torch import Tensor

from casp.kernels import operators
from casp_quip_sharp.orders import LARGEST_ORDER, construction, hadamard_matrix

_RADIX = 16  # four butterfly levels as one small matrix product: a quarter of the passes over memory
_LARGEST_DENSE_HARTLEY = 256
_LARGEST_KERNEL_POWER = 2**15  # of fast_hadamard_transform


@dataclass(frozen=True)
class Plan:
    """n = product(orders) * hartley * power: how the transform of width n is put together.

    orders: of dense Hadamard matrices, each with an odd factor; hartley: width of Hartley's part (odd, 1 = none);
    power: of two, Sylvester's part, the fastest-running index.
    """

    orders: tuple[int, ...]
    hartley: int
    power: int

    @property
    def width(self) -> int:
        """The n that the parts make up."""
        return prod(self.orders) * self.hartley * self.power

    @property
    def is_hadamard(self) -> bool:
        """Whether all entries have the size 1 / sqrt(n)."""
        return self.hartley == 1

    def _rank(self) -> tuple[int, int, tuple[int, ...]]:
        # Smallest Hartley part first, then the fewest operations.
        return self.hartley, sum(self.orders) + 2 * self.power.bit_length(), self.orders


def _plans(odd: int, power: int, smallest: int) -> list[Plan]:
    """Every plan for odd * power whose orders have odd parts of at least `smallest`, in ascending order."""
    found = [Plan((), odd, power)]
    for part in range(smallest, odd + 1, 2):
        if odd % part:
            continue
        twos = 4
        while twos <= power and part * twos <= LARGEST_ORDER:
            if construction(part * twos):
                rest = _plans(odd // part, power // twos, part)
                found += [Plan((part * twos, *plan.orders), plan.hartley, plan.power) for plan in rest]
            twos *= 2
    return found


@cache
def transform_plan(width: int) -> Plan:
    """The cheapest plan for this width among those with the smallest Hartley part."""
    if width < 1:
        raise ValueError(f"a transform of width {width} does not exist")
    power = width & -width
    return min(_plans(width // power, power, 3), key=Plan._rank)


def _hartley_angles(m: int) -> np.ndarray:
    # The product is reduced in integers: the angles of a large m would lose their digits.
    index = np.arange(m)
    return 2 * np.pi / m * (np.outer(index, index) % m)


@cache
def _dense(kind: str, order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One factor of the Kronecker product, orthogonal, (order, order)."""
    if kind == "hartley":
        angles = _hartley_angles(order)
        matrix = (np.cos(angles) + np.sin(angles)) / np.sqrt(order)
    elif kind == "sylvester":
        matrix = np.ones((1, 1))
        while len(matrix) < order:
            matrix = np.kron(matrix, hadamard_matrix(2))
        matrix = matrix / np.sqrt(order)
    else:
        matrix = hadamard_matrix(order) / np.sqrt(order)
    return torch.from_numpy(matrix).to(device=device, dtype=dtype)


def _along(x: Tensor, width: int, inner: int, matrix: Tensor) -> Tensor:
    """Apply `matrix` (width, width) to the axis of that width which is followed by `inner` elements."""
    if inner == 1:
        return (x.reshape(-1, width) @ matrix.T).view(x.shape)
    return torch.matmul(matrix, x.reshape(-1, width, inner)).reshape(x.shape)


def _hartley_fft(x: Tensor, width: int, inner: int) -> Tensor:
    spectrum = torch.fft.fft(x.reshape(-1, width, inner), dim=1, norm="ortho")
    return (spectrum.real - spectrum.imag).reshape(x.shape)


@cache
def _kernel() -> Callable[..., Tensor] | None:
    """`hadamard_transform` of the package fast_hadamard_transform where it is installed, else None."""
    if find_spec("fast_hadamard_transform") is None:
        return None
    from fast_hadamard_transform import hadamard_transform

    return hadamard_transform


def _sylvester(x: Tensor, power: int) -> Tensor:
    """Sylvester's transform of the fastest-running index, (..., power) -> the same shape."""
    if x.is_cuda and x.dtype != torch.float64 and power <= _LARGEST_KERNEL_POWER and _kernel() is not None:
        return _kernel()(x.reshape(-1, power), scale=power**-0.5).view(x.shape)
    inner = 1
    while power > 1:
        radix = min(power, _RADIX)
        x = _along(x, radix, inner, _dense("sylvester", radix, x.dtype, x.device))
        power, inner = power // radix, inner * radix
    return x


def transform(x: Tensor, inverse: bool = False) -> Tensor:
    """`x T^T` for the orthogonal T of width `x.shape[-1]`, or `x T` (T^T x in column form) if `inverse`.

    x: (..., n), float32 or float64, any device; returns a new tensor of the same shape and dtype. Half precision
    is computed in float32 and rounded once at the end. Float32 on a CPU goes through the kernel of quiptools, where
    that is built.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        return transform(x.float(), inverse).to(x.dtype)
    if x.numel() == 0:
        return x.clone()
    plan = transform_plan(x.shape[-1])
    if x.device.type == "cpu" and x.dtype == torch.float32 and has_kernel(plan):
        return transform_compiled(x, plan, inverse)
    return transform_reference(x, plan, inverse)


@cache
def factors(plan: Plan, inverse: bool, device: torch.device) -> list[Tensor]:
    """The dense factors, float32, in the order in which they are applied after Sylvester's."""
    found = [_dense("hartley", plan.hartley, torch.float32, device)] if plan.hartley > 1 else []
    for order in reversed(plan.orders):
        matrix = _dense("hadamard", order, torch.float32, device)
        found.append(matrix.T.contiguous() if inverse else matrix)
    return found


def has_kernel(plan: Plan) -> bool:
    """Whether quiptools is built and takes this plan: it has no FFT."""
    return operators() is not None and plan.hartley <= _LARGEST_DENSE_HARTLEY


def transform_compiled(x: Tensor, plan: Plan, inverse: bool, instruction_set: str = "") -> Tensor:
    """The same by quiptools, for float32 on a CPU; "" is its fastest instruction set."""
    parts = factors(plan, inverse, x.device)
    return operators().transform(x.reshape(-1, x.shape[-1]), parts, plan.power, instruction_set).view(x.shape)


def transform_reference(x: Tensor, plan: Plan, inverse: bool) -> Tensor:
    """`transform` by `plan` in plain PyTorch, for float32 and float64."""
    x = x.contiguous()
    result = _sylvester(x, plan.power)  # symmetric: its own inverse
    inner = plan.power
    if plan.hartley > 1:  # symmetric too
        if plan.hartley <= _LARGEST_DENSE_HARTLEY:
            dense = _dense("hartley", plan.hartley, x.dtype, x.device)
            result = _along(result, plan.hartley, inner, dense)
        else:
            result = _hartley_fft(result, plan.hartley, inner)
        inner *= plan.hartley
    for order in reversed(plan.orders):
        matrix = _dense("hadamard", order, x.dtype, x.device)
        result = _along(result, order, inner, matrix.T if inverse else matrix)
        inner *= order
    return result.clone() if result is x else result
