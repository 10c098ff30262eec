"""GPTQ as a backend of the core: formats, exact bytes, tensors in and out."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from casp.backend import Matrix
from casp_gptq.gptq import Quantized, check_inputs, quantize_under
from casp_gptq.grid import BITS, check_format, gaussian_distortion, group_bounds
from casp_gptq.linear import GPTQLinear, tensor_shapes
from casp_gptq.moment import Moment
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
    fine = 0.04
    """From 3 bits on errors are to each other as these distortions: eval/results/plan/prices-gptq.json."""

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

    def distortion(self, format: Mapping[str, Any], out_features: int, in_features: int) -> float:
        """Mean squared error of a Gaussian matrix in a draft; the last of the groups that share a grid may be short."""
        bounds = group_bounds(in_features, format["group_size"])
        whole, last = (stop - start for start, stop in (bounds[0], bounds[-1]))
        told = {size: gaussian_distortion(format["bits"], size, self.draft["clip_steps"]) for size in (whole, last)}
        return (told[whole] * (in_features - last) + told[last] * last) / in_features

    def quantize(
        self,
        weight: Tensor,
        hessian: Tensor,
        format: Mapping[str, Any],
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> dict[str, Tensor]:
        """Quantize `weight` (out, in) under `hessian` (in, in): a group of one, see `quantize_group`.

        Nothing here is random: `generator` is ignored.
        """
        one = Matrix(weight, format, generator, settings.pop("name", "the weight"))
        return next(self.quantize_group([one], hessian, [0], **settings))

    def quantize_group(
        self,
        matrices: Sequence[Matrix],
        hessian: Tensor,
        wanted: Sequence[int],
        *,
        damping: float = 0.01,
        act_order: bool = True,
        **settings: Any,
    ) -> Iterator[dict[str, Tensor]]:
        """Quantize those numbered `wanted` of matrices that share an input, whose moment is ordered and factored once.

        settings: those of `casp_gptq.gptq.gptq_quantize`.
        """
        mine = [matrices[number] for number in wanted]
        for one in mine:
            check_inputs(one.weight, hessian, one.name)
        moment = Moment.of(hessian, damping, act_order, matrices[0].name)
        for one in mine:
            bits, group_size = one.format["bits"], one.format["group_size"]
            found = quantize_under(one.weight, moment, bits, group_size, act_order=act_order, **settings)
            yield pack_tensors(found, bits)

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
