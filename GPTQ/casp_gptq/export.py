"""A plain GPTQ checkpoint from a finished CASP one: what stock transformers + gptqmodel (or vLLM) load.

The packed tensors are the same; what differs is the config, one index tensor a layer, and what can be said:
one width and group size for the whole model, no low-rank layers, sizes in whole runs of 32 and whole groups.
"""

from pathlib import Path

import torch
from torch import Tensor

import casp
from casp.budget import matrices
from casp.errors import UserError
from casp.model.decoder import Decoder
from casp.reading.documents import read_json
from casp.run.export import export_checkpoint, refuse_taken_apart, uniform_format
from casp_gptq.packing import RUN

GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # those that gptqmodel's kernels take

CARD = """# GPTQ checkpoint

Quantized with CASP to {bits} bits, groups of {group_size}, {grid} grid; packed as `gptq_v2`.

```python
from transformers import AutoModelForCausalLM  # needs: pip install gptqmodel optimum

model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float16")  # gptqmodel computes in half precision
```
"""


def common_format(modules: dict[str, dict], shapes: dict[str, tuple[int, int, int]]) -> dict[str, int]:
    """The one format of all `modules`; UserError that says why a plain GPTQ checkpoint cannot hold them.

    modules: path -> entry of the quantization_config; shapes: path -> (block, out_features, in_features).
    """
    format = uniform_format(modules, "GPTQ")
    if format["group_size"] not in GROUP_SIZES:
        raise UserError(
            f"gptqmodel reads groups of {', '.join(map(str, GROUP_SIZES))} columns, not of {format['group_size']}; "
            "change --group-size or leave out --export."
        )
    for path, (_, out_features, in_features) in shapes.items():
        if in_features % RUN or out_features % RUN:
            raise UserError(
                f"{path} is {out_features} x {in_features}, and a plain GPTQ checkpoint needs multiples of {RUN}; "
                "leave out --export."
            )
        if format["group_size"] != -1 and in_features % format["group_size"]:
            raise UserError(
                f"{path} has {in_features} inputs, which groups of {format['group_size']} do not divide: gptqmodel's "
                "kernels refuse that; give a --group-size that does, or leave out --export."
            )
    return format


def check_exportable(decoder: Decoder, format: dict[str, int]) -> None:
    """UserError, before any work is done, when `decoder` quantized to `format` could not be exported."""
    refuse_taken_apart(decoder, "GPTQ")
    shapes = matrices(decoder)
    modules = {path: {"format": format} for path in shapes}
    common_format({**(decoder.compression or {}).get("modules", {}), **modules}, shapes)


def export_folder(output: Path) -> Path:
    """Where the export of `output` goes: OUTPUT-gptqmodel, beside it."""
    return output.with_name(output.name + "-gptqmodel")


def export_gptq(folder: Path, output: Path, symmetric: bool) -> Path:
    """Write the CASP checkpoint `folder` as a plain GPTQ checkpoint `output`, complete or not at all.

    UserError when `output` holds anything but the export of the same checkpoint. symmetric: the grid that `folder`
    was quantized with; kernels that need symmetric zeros go by it.
    """
    decoder = Decoder(folder)
    modules = read_json(folder / "config.json", "the config")["quantization_config"]["modules"]
    shapes = {path: shape for path, shape in matrices(decoder).items() if path in modules}
    format = common_format(modules, shapes)
    config = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        **format,
        "sym": symmetric,
        "desc_act": False,  # groups are runs of neighbouring columns, whatever the order of rounding was
        "act_group_aware": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "block_name_to_quantize": decoder.blocks_path,
        "meta": {"quantizer": [f"casp:{casp.__version__}"]},
    }

    def rewrite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for path, (_, _, columns) in shapes.items():
            if f"{path}.qweight" in tensors:
                width = columns if format["group_size"] == -1 else format["group_size"]
                tensors[f"{path}.g_idx"] = (torch.arange(columns) // width).to(torch.int32)
        return tensors

    card = CARD.format(**format, grid="symmetric" if symmetric else "asymmetric")
    beside = {"quantize_config.json": config}  # where auto-gptq and older loaders look
    return export_checkpoint(folder, output, "gptq", rewrite, config, card, beside)
