"""Quantized layers of random codes, for timing."""

from collections.abc import Sequence

import torch
from casp_gptq.grid import BITS
from casp_gptq.linear import GPTQLinear
from casp_quip_sharp.codebook import FAMILIES as CODEBOOKS
from casp_quip_sharp.linear import QuipSharpLinear

from casp.linear import QuantizedLinear

GPTQ = "gptq"
FAMILIES = (*CODEBOOKS, GPTQ)
GROUP = 128
"""Columns that share a scale in GPTQ's layers."""


def bits_of(family: str, bits: Sequence[int]) -> list[int]:
    """Those of the bits that the family has."""
    return [width for width in bits if family != GPTQ or width in BITS]


def random_layer(
    family: str, bits: int, out_features: int, in_features: int, device: torch.device | str
) -> QuantizedLinear:
    """A layer of random codes and signs, of one of QuIP#'s codebooks or GPTQ's."""
    if family == GPTQ:
        layer = GPTQLinear(out_features, in_features, False, {"bits": bits, "group_size": GROUP})
    else:
        layer = QuipSharpLinear(out_features, in_features, False, {"codebook": family, "bits": bits})
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.fill_(1 / 64)
        else:
            buffer.view(torch.uint8).random_(0, 256)
    return layer.to(device)
