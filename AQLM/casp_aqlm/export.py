"""A plain AQLM checkpoint from a finished CASP one: what stock transformers + the package `aqlm` load.

The layout of that package: codes as signed integers of the next size, those of 2^(B - 1) and more less 2^B;
codebooks and scales with the sizes of groups along outputs (here 1) spelt out. One scheme for the whole model, no
low-rank layers, whole groups.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from casp.budget import matrices
from casp.errors import UserError
from casp.model.decoder import Decoder
from casp.reading.documents import read_json
from casp.run.export import export_checkpoint, refuse_taken_apart, uniform_format
from casp_aqlm.packing import unpack
from casp_aqlm.scheme import Scheme

CARD = """# AQLM checkpoint

Quantized with CASP: additive codebooks {scheme}.

```python
from transformers import AutoModelForCausalLM  # needs: pip install aqlm accelerate

model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")  # on a CPU aqlm computes in float32
```

On a CPU set NUMBA_NUM_THREADS=1: the kernel of aqlm 1.1.7 lets its threads add to the same sums, and with more than one
it returns other numbers at every call. It also reorders the codes at a layer's first call: save such a model before it
is used, or not at all.
"""


def signed_codes(packed: Tensor, scheme: Scheme, in_features: int) -> Tensor:
    """Our packed codes (out, bytes) as the package holds them: (out, groups, M) int8, or int16 beyond 8 bits."""
    groups = scheme.groups(in_features)
    codes = unpack(packed, scheme.code_bits, groups * scheme.codebooks).view(-1, groups, scheme.codebooks)
    wrapped = torch.where(codes >= scheme.size // 2, codes - scheme.size, codes)
    return wrapped.to(torch.int8 if scheme.code_bits <= 8 else torch.int16)


def _checked(format: Mapping[str, Any], shapes: Mapping[str, tuple[int, int, int]]) -> Scheme:
    scheme = Scheme.of(format)
    for path, (_, out_features, in_features) in shapes.items():
        if in_features % scheme.group:
            raise UserError(
                f"{path} is {out_features} x {in_features}, which groups of {scheme.group} do not divide: a plain AQLM "
                "checkpoint cannot hold that; choose another --scheme or leave out --export."
            )
    return scheme


def check_exportable(decoder: Decoder, format: Mapping[str, Any]) -> None:
    """UserError, before any work is done, when `decoder` quantized to `format` could not be exported."""
    refuse_taken_apart(decoder, "AQLM")
    shapes = matrices(decoder)
    modules = {path: {"format": format} for path in shapes}
    _checked(uniform_format({**(decoder.compression or {}).get("modules", {}), **modules}, "AQLM"), shapes)


def export_folder(output: Path) -> Path:
    """Where the export of `output` goes: OUTPUT-aqlm, beside it."""
    return output.with_name(output.name + "-aqlm")


def export_aqlm(folder: Path, output: Path) -> Path:
    """Write the CASP checkpoint `folder` as a plain AQLM checkpoint `output`, complete or not at all.

    UserError when `output` holds anything but the export of the same checkpoint.
    """
    decoder = Decoder(folder)
    modules = read_json(folder / "config.json", "the config")["quantization_config"]["modules"]
    shapes = {path: shape for path, shape in matrices(decoder).items() if path in modules}
    scheme = _checked(uniform_format(modules, "AQLM"), shapes)
    others = [path for path, module in decoder.model.named_modules() if type(module) is nn.Linear]
    config = {
        "quant_method": "aqlm",
        "nbits_per_codebook": scheme.code_bits,
        "num_codebooks": scheme.codebooks,
        "in_group_size": scheme.group,
        "out_group_size": 1,
        # transformers 4 compares names of weights, 5 those of modules
        "linear_weights_not_to_quantize": sorted([*others, *(f"{path}.weight" for path in others)]),
    }

    def rewrite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for path, (_, _, in_features) in shapes.items():
            if f"{path}.codes" in tensors:
                codebooks, scales = tensors[f"{path}.codebooks"], tensors[f"{path}.scales"]
                tensors[f"{path}.codes"] = signed_codes(tensors[f"{path}.codes"], scheme, in_features)
                tensors[f"{path}.codebooks"] = codebooks[:, :, None].to(torch.float16)
                tensors[f"{path}.scales"] = scales.view(-1, 1, 1, 1)
        return tensors

    return export_checkpoint(folder, output, "aqlm", rewrite, config, CARD.format(scheme=scheme))
