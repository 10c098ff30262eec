"""GPTQ as a backend of the core: formats, exact bytes, tensors in and out."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from casp_gptq.gptq import Quantized, gptq_quantize
from casp_gptq.grid import BITS, check_format
from casp_gptq.linear import GPTQLinear, tensor_shapes
from casp_gptq.packing import pack

GROUP_SIZES = (128, 64)  # that a plan chooses from


def pack_tensors(quantized: Quantized, bits: int) -> dict[str, Tensor]:
    """The tensors that a `GPTQLinear` stores, from codes, scales and zeros in matrix form."""
    return {
        "qweight": pack(quantized.codes.T, bits),
        "qzeros": pack(quantized.zeros, bits).T.contiguous(),
        "scales": quantized.scales.T.contiguous(),
    }


class GPTQ:
    """The backend "gptq". A format is {"bits": 2|3|4|8, "group_size": columns that share a scale, -1 for all}."""

    name = "gptq"
    draft = MappingProxyType({"sweeps": 0, "clip_steps": 10})

    def format(self, bits: int, group_size: int = 128) -> dict[str, int]:
        """The format of these settings; UserError when there is none."""
        check_format(bits, group_size)
        return {"bits": bits, "group_size": group_size}

    def formats(
        self, out_features: int, in_features: int, *, tuned: bool = False, group_size: int | None = None
    ) -> list[dict[str, int]]:
        """Every width in groups of `GROUP_SIZES`, or of `group_size`, in ascending bytes; all can be tuned."""
        sizes = GROUP_SIZES if group_size is None else (group_size,)
        found = [self.format(bits, size) for bits in BITS for size in sizes]
        return sorted(found, key=lambda format: self.bytes(format, out_features, in_features))

    def bytes(self, format: Mapping[str, Any], out_features: int, in_features: int) -> int:
        """Exact bytes of codes, packed zeros and scales (padding to multiples of 32 included)."""
        shapes = tensor_shapes(format["bits"], format["group_size"], out_features, in_features)
        return sum(rows * columns * dtype.itemsize for (rows, columns), dtype in shapes.values())

    def quantize(
        self,
        weight: Tensor,
        hessian: Tensor,
        format: Mapping[str, Any],
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> dict[str, Tensor]:
        """Quantize `weight` (out, in) under `hessian` (in, in); `settings` are those of `gptq_quantize`.

        Nothing here is random: `generator` is ignored.
        """
        quantized = gptq_quantize(weight, hessian, format["bits"], format["group_size"], **settings)
        return pack_tensors(quantized, format["bits"])

    def linear(
        self,
        out_features: int,
        in_features: int,
        bias: bool,
        format: Mapping[str, Any],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> GPTQLinear:
        """An empty layer whose state dict takes what `quantize` returns."""
        return GPTQLinear(out_features, in_features, bias, format, dtype, device)

    def tunable(self, module: nn.Module) -> dict[str, Tensor]:
        """What fine-tuning may move: the scales of the groups, and the bias if there is one."""
        tensors = {"scales": module.scales, "bias": module.bias}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}
