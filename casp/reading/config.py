"""The config of a model folder, opened without ever running code that the folder brings."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from casp.errors import UserError, told_as
from casp.reading.documents import read_json
from casp.reading.files import is_there, require_file, require_folder

READ = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".safetensors"}
"""Endings of the files of a model folder that are read, here or by transformers."""
DESCRIPTIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
)
WHOLE_NUMBERS = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 31,
    "num_experts": 1 << 14,
    "image_size": 1 << 14,
    "patch_size": 1 << 14,
    "num_channels": 1 << 10,
}
"""What a decoder or a tower needs, at least 1, and the largest that is believed."""
SHARES = ("rms_norm_eps", "layer_norm_eps", "attention_dropout")
_MOST_PATCHES = 1 << 20


def check_folder(folder: Path) -> None:
    """UserError for a model folder whose files are not what they seem, or that brings code of its own."""
    require_folder(folder, "the model folder")
    if not is_there(folder / "config.json"):
        raise UserError(f"{folder} is not a model folder (no config.json in it); correct --model.")
    for path in sorted(folder.iterdir()):
        if path.suffix in READ and not path.name.startswith("."):
            require_file(path, "the model's file")
    if is_there(folder / "adapter_config.json"):
        raise UserError(f"{folder} is an adapter to another model; merge the two and give the merged checkpoint.")
    for name in DESCRIPTIONS:
        if is_there(folder / name):
            _refuse_code(folder / name, read_json(folder / name, "the model's file"))


def _refuse_code(file: Path, value: Any) -> None:
    level = [value]
    while level:
        for inner in level:
            if isinstance(inner, dict) and inner.get("auto_map"):
                raise UserError(
                    f"{file} asks for code of the folder's own (auto_map), which CASP never runs; where transformers "
                    "knows the architecture itself, remove that entry, else choose another model."
                )
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]


def open_config(folder: Path) -> Any:
    """The config of the model in `folder`, as transformers' own classes read it, its numbers possible ones."""
    folder = Path(folder)
    check_folder(folder)
    file = folder / "config.json"
    with told_as(f"{file} does not describe a model that transformers knows", "download or write it again"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        text = config.get_text_config()
    if config.dtype is not None and not (isinstance(config.dtype, torch.dtype) and config.dtype.is_floating_point):
        raise UserError(f"{file} gives {config.dtype!r} as dtype; give float32, bfloat16 or float16.")
    parts = {"": text, "vision_config.": getattr(config, "vision_config", None)}
    for prefix, part in parts.items():
        if part is not None:
            _check_numbers(file, prefix, part)
    for part in (text, config):
        limits = (getattr(part, "num_attention_heads", None), getattr(part, "num_key_value_heads", None))
        if None not in limits and limits[0] % limits[1]:
            raise UserError(f"{file}: {limits[0]} heads cannot share {limits[1]} key and value heads; correct it.")
    return config


def _check_numbers(file: Path, prefix: str, part: Any) -> None:
    for name, most in WHOLE_NUMBERS.items():
        value = getattr(part, name, None)
        values = value if isinstance(value, list | tuple) else [value]
        for number in values:
            if number is not None and not (type(number) is int and 1 <= number <= most):
                shown = str(number)[:40]
                raise UserError(f"{file}: {prefix}{name} is {shown}, not a whole number from 1 to {most}; correct it.")
    for name in SHARES:
        value = getattr(part, name, None)
        if value is not None and not (type(value) in (int, float) and math.isfinite(value) and 0 <= value < 1):
            raise UserError(f"{file}: {prefix}{name} is {str(value)[:40]}, not a number from 0 to 1; correct it.")
    image, patch = getattr(part, "image_size", None), getattr(part, "patch_size", None)
    if type(image) is int and type(patch) is int and (image // patch) ** 2 > _MOST_PATCHES:
        raise UserError(f"{file}: {prefix}image_size {image} in patches of {patch} is too much; correct it.")


def quantization_of(config: Any) -> dict[str, Any]:
    """The `quantization_config` of a config as a dict; empty for a model that is not quantized."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return {}
    found = found if isinstance(found, dict) else getattr(found, "to_dict", dict)()
    if not isinstance(found.get("quant_method"), str):
        raise UserError("the quantization_config in config.json names no quant_method; make the checkpoint again.")
    return found
