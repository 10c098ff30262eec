"""A plain GPTQ checkpoint from a finished CASP one: what stock transformers + gptqmodel (or vLLM) load.

The packed tensors are the same; what differs is the config, one index tensor a layer, and what can be said:
one width and group size for the whole model, no low-rank layers, sizes in whole runs of 32 and whole groups.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from casp.budget import matrices
from casp.digest import companions
from casp.errors import UserError
from casp.files import write_atomically, write_json, write_shard
from casp.folder import WorkFolder
from casp.models import Decoder
from casp.run import REPORT_FILE
from casp.shards import INDEX
from casp.stage import base_model
from casp_gptq.packing import RUN

GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # those that gptqmodel's kernels take
_WRITTEN = {"config.json", INDEX, "README.md", REPORT_FILE}  # made here, or of no use there

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
    for path, entry in modules.items():
        if "rank" in entry:
            raise UserError(
                f"{path} is a low-rank layer, which a plain GPTQ checkpoint cannot hold; leave out --export or start "
                "from the original model (--from-original)."
            )
    formats = {json.dumps(entry["format"], sort_keys=True) for entry in modules.values()}
    if len(formats) != 1:
        raise UserError(
            "a plain GPTQ checkpoint has one bit width for all layers, this model has several; leave out --export or "
            "the byte budget."
        )
    format = json.loads(formats.pop())
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
    shapes = matrices(decoder)
    modules = {path: {"format": format} for path in shapes}
    common_format({**(decoder.compression or {}).get("modules", {}), **modules}, shapes)


class ExportFolder(WorkFolder):
    """The work of an export, on a finished checkpoint."""

    kind = "export"


def export_folder(output: Path) -> Path:
    """Where the export of `output` goes: OUTPUT-gptqmodel, beside it."""
    return output.with_name(output.name + "-gptqmodel")


def export_gptq(folder: Path, output: Path, symmetric: bool) -> Path:
    """Write the CASP checkpoint `folder` as a plain GPTQ checkpoint `output`, complete or not at all.

    UserError when `output` holds anything but the export of the same checkpoint. symmetric: the grid that `folder`
    was quantized with; kernels that need symmetric zeros go by it.
    """
    decoder = Decoder.open(folder)
    config = json.loads((folder / "config.json").read_text())
    modules, shapes = config["quantization_config"]["modules"], matrices(decoder)
    format = common_format(modules, {path: shapes[path] for path in modules})
    work = ExportFolder(output, decoder, "gptq-export", base_model(folder, str(folder)), {"symmetric": symmetric}, "")
    if work.done:
        return output

    weight_map, total = {}, 0
    for shard in sorted({entry.shard for entry in decoder.shards.entries.values()}):
        tensors = load_file(shard)
        for path, (_, _, columns) in shapes.items():
            if f"{path}.qweight" in tensors:
                width = columns if format["group_size"] == -1 else format["group_size"]
                tensors[f"{path}.g_idx"] = (torch.arange(columns) // width).to(torch.int32)
        write_shard(work.result / shard.name, tensors)
        weight_map |= dict.fromkeys(tensors, shard.name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(work.result / INDEX, index)
    copied = [file for file in companions(folder) if file.name not in _WRITTEN]
    for file in copied:
        write_atomically(work.result / file.name, file.read_bytes())
    card = CARD.format(**format, grid="symmetric" if symmetric else "asymmetric")
    write_atomically(work.result / "README.md", card.encode())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        **format,
        "sym": symmetric,
        "desc_act": False,  # groups are runs of neighbouring columns, whatever the order of rounding was
        "act_group_aware": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "block_name_to_quantize": decoder.blocks_path,
    }
    write_json(work.result / "config.json", config)
    return work.close({*_WRITTEN, *weight_map.values(), *(file.name for file in copied)} - {REPORT_FILE})
