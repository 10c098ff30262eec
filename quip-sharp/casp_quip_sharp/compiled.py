"""The package quiptools, compiled kernels: used where it is built, and never needed."""

import warnings
from functools import cache
from types import ModuleType

import torch

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


def has_cuda_kernels() -> bool:
    """Whether quiptools was built with its CUDA kernels."""
    found = operators()
    return found is not None and torch._C._dispatch_has_kernel_for_dispatch_key("quiptools::product", "CUDA")


@cache
def warn_of_plain_pytorch(device_type: str) -> None:
    """Say, once in a process and kind of device, that layers run without kernels."""
    reason = _load()[1] or f"has no kernels for the device {device_type}"
    warnings.warn(f"quiptools {reason}: QuIP# layers run in plain PyTorch, slowly; build it with {BUILD}", stacklevel=2)


@cache
def warn_of_slow_rounding(device_type: str) -> None:
    """Say, once in a process, that walks through the trellis are looked for without compiled loops."""
    if device_type == "cpu":
        warnings.warn(
            f"quiptools {_load()[1]}: the trellis is searched in plain PyTorch, a hundred times slower; build it with "
            f"{BUILD}",
            stacklevel=2,
        )
