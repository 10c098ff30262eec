"""The two kinds of module that stand in for a decoder's `nn.Linear`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowRankLinear(nn.Module):
    """`y = up(down(x)) + bias`: a linear of rank `rank`, stored as its two factors.

    `down.weight` is (rank, in_features) and `up.weight` (out_features, rank); a bias belongs to `up`.
    The factors are ordinary linears, so a quantizer treats them like any other.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, dtype=dtype, device=device)
        self.up = nn.Linear(rank, out_features, bias=bias, dtype=dtype, device=device)

    @property
    def weight(self) -> Tensor:
        """The dense (out_features, in_features) product, computed on each access."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the linear that this one replaces, or None."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        return self.up(self.down(x))

    def extra_repr(self) -> str:
        """What `print(model)` shows of this module besides its factors."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class QuantizedLinear(nn.Module):
    """Base of the backends' linears: packed tensors as buffers, a dense weight only while it is used.

    A backend registers the tensors that its `quantize` returns as buffers of the same names and implements
    `dequantize`. `format` is the JSON description from which the empty module can be built again.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        bias: bool,
        format: Mapping[str, Any],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format = dict(format)
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """As of every module, for `model.bfloat16()` and the like; packed tensors keep the dtype of their format.

        Rounding the float16 scales of a group to bfloat16 would cost 0.4% of every weight, without a word.
        """
        packed = {id(tensor) for tensor in self._buffers.values()}

        def keep(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return tensor.to(changed.device) if id(tensor) in packed and changed.dtype != tensor.dtype else changed

        return super()._apply(keep, recurse)

    def dequantize(self) -> Tensor:
        """The dense (out_features, in_features) weight that the packed tensors stand for."""
        raise TypeError(f"{type(self).__name__} does not implement dequantize()")

    @property
    def weight(self) -> Tensor:
        """The dense weight, computed on each access and never kept."""
        return self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features) in x's dtype; the reference for every kernel."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantize().to(x.dtype), bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this module."""
        details = ", ".join(f"{key}={value}" for key, value in self.format.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, {details}"


def stored_as(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Real `values` in the dtype of a stored tensor: the nearest that it holds, also where it holds whole numbers."""
    if dtype.is_floating_point:
        return values.to(dtype)
    limits = torch.iinfo(dtype)
    return values.round().clamp(limits.min, limits.max).to(dtype)


def is_finite(tensor: Tensor) -> bool:
    """Whether a stored tensor of any dtype, of one byte too, holds neither NaN nor infinity."""
    if not tensor.is_floating_point():
        return True
    tensor = tensor.float() if tensor.itemsize == 1 else tensor
    # A sum that is finite has finite terms, and takes a tenth of the time; one that is not may just be too large.
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())
