"""The registry of compiled kernels: what computes a layer's product, on this machine, for these tensors.

A `Kernel` is one computation, with a plain version in PyTorch and the name of the operator of quiptools that does the
same. An `Implementation` is one way to run kernels: an instruction set of this CPU, CUDA, or the plain version, which
can do everything and is what the others are tested against. `run` takes the fastest that can. quiptools is used where
it is built, and never needed.
"""

import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

BUILD = "pip install --no-build-isolation ./quip-sharp/quiptools"


@cache
def _load() -> tuple[ModuleType | None, str]:
    """The operators, or None and why there are none."""
    try:
        import quiptools  # noqa: F401  # registers torch.ops.quiptools
    except ModuleNotFoundError:
        return None, "is not built"
    except OSError:
        return None, "was built for another version of PyTorch"
    return torch.ops.quiptools, ""


def operators() -> ModuleType | None:
    """`torch.ops.quiptools`, or None where it is not built for this PyTorch."""
    return _load()[0]


@torch.compiler.assume_constant_result
def has_operator(name: str, device_type: str) -> bool:
    """Whether quiptools is built and has this operator for this kind of device."""
    found = operators()
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if found is None or key is None or not hasattr(found, name):  # an older build has fewer
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"quiptools::{name}", key)


@torch.compiler.assume_constant_result
def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in bfloat16; without them float32 is several times faster."""
    if dtype != torch.bfloat16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def warn_of_plain_pytorch(device_type: str) -> None:
    """Say, once in a process and kind of device, that layers run without kernels."""
    reason = _load()[1] or f"has no kernels for the device {device_type}"
    warnings.warn(
        f"quiptools {reason}: quantized layers run in plain PyTorch, slowly; build it with {BUILD}", stacklevel=2
    )


class Kernel(Protocol):
    """One computation that is linear in x, but for a constant: x (..., in) to (..., out)."""

    operator: str
    """Its name in quiptools."""
    trains: bool
    """Whether a tensor other than x wants a gradient, which only the plain version gives."""

    def fits(self, x: Tensor) -> bool:
        """Whether the operator takes this kernel and x, on a device that has the operator."""

    def arguments(self) -> tuple[Any, ...]:
        """What the operator takes after x and before the name of the instruction set."""

    def reference(self, x: Tensor) -> Tensor:
        """The plain version, differentiable in x."""


class Implementation(Protocol):
    """One way to run kernels."""

    name: str

    def can(self, kernel: Kernel, x: Tensor) -> bool:
        """Whether it runs this kernel on these vectors, where they are."""

    def run(self, kernel: Kernel, x: Tensor) -> Tensor:
        """What the kernel says."""


@dataclass(frozen=True)
class Reference:
    """Plain PyTorch, any device."""

    name: str = "reference"

    def can(self, kernel: Kernel, x: Tensor) -> bool:
        """Always."""
        return True

    def run(self, kernel: Kernel, x: Tensor) -> Tensor:
        """See `Implementation`."""
        return kernel.reference(x)


@dataclass(frozen=True)
class Compiled:
    """The operators of quiptools for one kind of device; on a CPU for one instruction set."""

    device_type: str
    instruction_set: str = ""

    @property
    def name(self) -> str:
        """cpu-avx2, cuda and the like."""
        return f"{self.device_type}-{self.instruction_set}" if self.instruction_set else self.device_type

    def can(self, kernel: Kernel, x: Tensor) -> bool:
        """Where x is on its device and nothing but x wants a gradient."""
        return (
            x.device.type == self.device_type
            and not (kernel.trains and torch.is_grad_enabled())
            and has_operator(kernel.operator, self.device_type)
            and kernel.fits(x)
        )

    def run(self, kernel: Kernel, x: Tensor) -> Tensor:
        """See `Implementation`; a gradient in x goes back by operators too."""
        operator = getattr(torch.ops.quiptools, kernel.operator)
        return operator(x, *kernel.arguments(), self.instruction_set)


@cache
def implementations() -> tuple[Implementation, ...]:
    """Those of this machine, the fastest first; the plain version is last."""
    if operators() is None:
        return (Reference(),)
    on_cuda = (Compiled("cuda"),) if has_operator("product", "cuda") else ()
    return (*(Compiled("cpu", name) for name in operators().instruction_sets()), *on_cuda, Reference())


def run(kernel: Kernel, x: Tensor) -> Tensor:
    """What the kernel says, by the fastest implementation that can."""
    if torch.compiler.is_compiling():
        # A graph names no instruction set: an operator takes the fastest of the machine that it runs on.
        traced = Compiled(x.device.type)
        return traced.run(kernel, x) if traced.can(kernel, x) else kernel.reference(x)
    return next(one for one in implementations() if one.can(kernel, x)).run(kernel, x)


@cache
def warn_of_slow_rounding(device_type: str) -> None:
    """Say, once in a process, that walks through the trellis are looked for without compiled loops."""
    if device_type == "cpu":
        warnings.warn(
            f"quiptools {_load()[1]}: the trellis is searched in plain PyTorch, a hundred times slower; build it with "
            f"{BUILD}",
            stacklevel=2,
        )
