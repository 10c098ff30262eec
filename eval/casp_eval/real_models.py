"""The shapes of the paper's models and their neighbours, recorded, and checkpoints of them without weights.

The weights are headers over empty files of the right length: nothing of a tensor is read to open a checkpoint. That is
enough to find a model's linears and to count the bytes of a plan, without the hub.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as T
from accelerate import init_empty_weights

from casp.model.decoder import _factory

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
MISTRAL_7B = LLAMA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8}
QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
SIGLIP_27 = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}}


def clip() -> T.CLIPVisionConfig:
    return T.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


@dataclass(frozen=True)
class Real:
    """A model: its name on the hub, its config, and the sizes of its language model as transformers calls them."""

    hub: str
    config: Callable[[], T.PretrainedConfig]
    shape: dict[str, Any]


REAL = {
    "Llama-2-7B": Real("meta-llama/Llama-2-7b-hf", lambda: T.LlamaConfig(**LLAMA_7B), LLAMA_7B),
    "LLaVA-1.5-7B": Real(
        "llava-hf/llava-1.5-7b-hf",
        lambda: T.LlavaConfig(vision_config=clip(), text_config=T.LlamaConfig(**LLAMA_7B)),
        LLAMA_7B,
    ),
    "LLaVA-1.5-13B": Real(
        "llava-hf/llava-1.5-13b-hf",
        lambda: T.LlavaConfig(vision_config=clip(), text_config=T.LlamaConfig(**LLAMA_13B)),
        LLAMA_13B,
    ),
    "LLaVA-NeXT-Mistral-7B": Real(
        "llava-hf/llava-v1.6-mistral-7b-hf",
        lambda: T.LlavaNextConfig(vision_config=clip(), text_config=T.MistralConfig(**MISTRAL_7B)),
        MISTRAL_7B,
    ),
    "LLaVA-NeXT-Vicuna-13B": Real(
        "llava-hf/llava-v1.6-vicuna-13b-hf",
        lambda: T.LlavaNextConfig(vision_config=clip(), text_config=T.LlamaConfig(**LLAMA_13B)),
        LLAMA_13B,
    ),
    "LLaVA-NeXT-Video-7B": Real(
        "llava-hf/LLaVA-NeXT-Video-7B-hf",
        lambda: T.LlavaNextVideoConfig(vision_config=clip(), text_config=T.LlamaConfig(**LLAMA_7B)),
        LLAMA_7B,
    ),
    "LLaVA-OneVision-7B": Real(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        lambda: T.LlavaOnevisionConfig(
            vision_config=T.SiglipVisionConfig(**SIGLIP_27), text_config=T.Qwen2Config(**QWEN2_7B)
        ),
        QWEN2_7B,
    ),
    "Qwen2.5-VL-7B": Real(
        "Qwen/Qwen2.5-VL-7B-Instruct", lambda: T.Qwen2_5_VLConfig(text_config=QWEN2_7B | MROPE), QWEN2_7B
    ),
}


def empty_checkpoint(config: T.PretrainedConfig, folder: Path) -> Path:
    """A checkpoint of `config` in bfloat16 whose file of weights is a hole."""
    config.dtype = torch.bfloat16
    with init_empty_weights():
        model = _factory(config).from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(words)) + words)
        file.truncate(8 + len(words) + end)
    return folder
