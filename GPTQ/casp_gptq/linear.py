"""The linear layer that holds GPTQ's packed tensors; unpacking in plain PyTorch, the reference for kernels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from casp.kernels import has_operator, run, warn_of_plain_pytorch
from casp.linear import QuantizedLinear
from casp_gptq.grid import check_format, group_bounds
from casp_gptq.kernels import Layer
from casp_gptq.packing import packed_rows, unpack


def tensor_shapes(
    bits: int, group_size: int, out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Name -> (shape, dtype) of every tensor that a layer of this format stores, bias aside."""
    check_format(bits, group_size)
    groups = len(group_bounds(in_features, group_size))
    return {
        "qweight": ((packed_rows(in_features, bits), out_features), torch.int32),
        "qzeros": ((groups, packed_rows(out_features, bits)), torch.int32),
        "scales": ((groups, out_features), torch.float16),
    }


class GPTQLinear(QuantizedLinear):
    """`y = x W^T + b`, W held as packed codes; where there is no kernel, unpacked for the duration of each call.

    Buffers: qweight int32, qzeros int32, scales float16, see `tensor_shapes` and `casp_gptq.packing`. Column j
    belongs to group j // group_size. format: {"bits": 2|3|4|8, "group_size": int}.
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
        super().__init__(out_features, in_features, bias, format, dtype, device)
        self.bits, self.group_size = int(format["bits"]), int(format["group_size"])
        shapes = tensor_shapes(self.bits, self.group_size, out_features, in_features)
        for name, (shape, stored) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=stored, device=device))

    def dequantize(self) -> Tensor:
        """The dense (out_features, in_features) weight, float32: a code times a float16 scale is exact there."""
        codes = unpack(self.qweight, self.bits, self.in_features)
        zeros = unpack(self.qzeros.T, self.bits, self.out_features).T
        width = self.in_features if self.group_size == -1 else self.group_size
        scales = self.scales.float()
        dense = codes.float()
        for g, (first, last) in enumerate(group_bounds(self.in_features, width)):
            dense[first:last].sub_(zeros[g]).mul_(scales[g])
        return dense.T

    def kernel(self) -> Layer:
        """What `casp.kernels` runs."""
        return Layer(self.qweight, self.qzeros, self.scales, self.bits, self.group_size, self.bias, self.dequantize)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features) of x's dtype, differentiable in x; see `Layer`."""
        layer = self.kernel()
        if not has_operator(layer.operator, x.device.type):
            warn_of_plain_pytorch(x.device.type)
        return run(layer, x)
