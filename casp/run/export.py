"""A finished CASP checkpoint rewritten as another library's: what all such exports have in common.

A plain checkpoint differs in the tensors of the quantized layers and in what its config says of them. Shards, index,
tokenizer and the rest are the same; low-rank layers and mixed formats have no place in it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from casp.cli.places import base_model
from casp.errors import UserError
from casp.model.decoder import Decoder
from casp.model.shards import INDEX
from casp.reading.compression import WEIGHTS_KEY
from casp.reading.documents import read_json
from casp.run.card import front_matter, inherited
from casp.run.digest import companions
from casp.run.files import write_atomically, write_json, write_shard
from casp.run.folder import WorkFolder
from casp.run.report import REPORT_FILE

_WRITTEN = {"config.json", INDEX, "README.md", REPORT_FILE}  # made here, or of no use there

Rewrite = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""The tensors of a shard by name -> those to be stored in their place."""


class ExportFolder(WorkFolder):
    """The work of an export."""

    kind = "export"


def uniform_format(modules: Mapping[str, Mapping[str, Any]], kind: str) -> dict[str, Any]:
    """The one format of all `modules`; UserError that says why a plain checkpoint of `kind` cannot hold them.

    modules: path -> entry of the quantization_config.
    """
    for path, entry in modules.items():
        if "rank" in entry:
            raise UserError(
                f"{path} is a low-rank layer, which a plain {kind} checkpoint cannot hold; leave out --export or start "
                "from the original model (--from-original)."
            )
    formats = {json.dumps(entry["format"], sort_keys=True) for entry in modules.values()}
    if len(formats) != 1:
        raise UserError(
            f"a plain {kind} checkpoint has one format for all layers, this model has several; leave out --export or "
            "the byte budget."
        )
    return json.loads(formats.pop())


def refuse_taken_apart(decoder: Decoder, kind: str) -> None:
    """UserError where linears are stored under other names than the architecture's own (`casp.model.split`)."""
    if decoder.splits:
        raise UserError(
            f"CASP takes linears of {decoder.folder} apart ({next(iter(decoder.splits))}, say), which a plain {kind} "
            "checkpoint holds whole; leave out --export."
        )


def export_checkpoint(
    folder: Path,
    output: Path,
    kind: str,
    rewrite: Rewrite,
    quantization_config: Mapping[str, Any],
    card: str,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write the CASP checkpoint `folder` as a plain one of `kind` to `output`, complete or not at all.

    The same export again is left as it is; UserError when `output` holds anything else. rewrite: of each shard;
    quantization_config: of the plain checkpoint; card: the README.md below its head; beside: more files of
    JSON, by name.
    """
    decoder = Decoder(folder)
    settings = {"quantization": dict(quantization_config)}
    work = ExportFolder(output, decoder, f"{kind}-export", base_model(folder, str(folder)), settings, "")
    if work.done:
        return output
    weight_map, total = {}, 0
    for shard in sorted({entry.shard for entry in decoder.shards.entries.values()}):
        tensors = rewrite(load_file(shard))
        write_shard(work.result / shard.name, tensors)
        weight_map |= dict.fromkeys(tensors, shard.name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(work.result / INDEX, index)
    copied = [file for file in companions(folder) if file.name not in _WRITTEN]
    for file in copied:
        write_atomically(work.result / file.name, file.read_bytes())
    config = read_json(folder / "config.json", "the config")
    config.pop(WEIGHTS_KEY, None)  # others read this one
    write_json(work.result / "config.json", {**config, "quantization_config": dict(quantization_config)})
    head = front_matter(work.base_model, decoder.is_multimodal, ["casp", kind], inherited(folder))
    write_atomically(work.result / "README.md", (head + card).encode())
    for name, content in (beside or {}).items():
        write_json(work.result / name, dict(content))
    return work.close(
        {*_WRITTEN, *(beside or {}), *weight_map.values(), *(file.name for file in copied)} - {REPORT_FILE}
    )
