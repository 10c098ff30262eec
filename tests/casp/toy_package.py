"""A quantizer as a third party would ship it: round to nearest on one scale a row, installed as a package."""

from pathlib import Path

SOURCE = """
import torch
from casp.linear import QuantizedLinear


class ToyLinear(QuantizedLinear):
    def __init__(self, out_features, in_features, bias, format, dtype=None, device=None):
        super().__init__(out_features, in_features, bias, format, dtype, device)
        self.register_buffer("codes", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.empty(out_features, 1, dtype=torch.float16, device=device))

    def dequantize(self):
        return self.codes.float() * self.scales.float()


class Toy:
    name = "toy"
    draft = {}

    def formats(self, out_features, in_features, *, tuned=False, **words):
        return [{"bits": bits} for bits in (2, 4, 8)]

    def bytes(self, format, out_features, in_features):
        return out_features * in_features + 2 * out_features

    def quantize(self, weight, hessian, format, generator, *, name, **settings):
        top = 2 ** (format["bits"] - 1) - 1
        scales = (weight.abs().amax(1, keepdim=True) / top).clamp_min(1e-6).half()
        return {"codes": (weight / scales.float()).round().clamp(-top, top).to(torch.int8), "scales": scales}

    def linear(self, out_features, in_features, bias, format, dtype=None, device=None):
        return ToyLinear(out_features, in_features, bias, format, dtype, device)

    def tunable(self, module):
        return {"scales": module.scales}
"""


def install(folder: Path) -> Path:
    """Write the package and its metadata into `folder`, which then only has to be on sys.path."""
    info = folder / "toy_quantizer-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "toy_quantizer.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-quantizer\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[casp.backends]\ntoy = toy_quantizer:Toy\nabsent = toy_quantizer_absent:Toy\n"
    )
    return folder
