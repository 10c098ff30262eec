"""The real models of the paper and its neighbours, from their configs alone: what is found, and exact bytes of plans.

The weights are headers over empty files of the right length: nothing of a tensor is read to open a checkpoint.
"""

import json
import struct
from pathlib import Path

import pytest
import torch
import transformers as T
from accelerate import init_empty_weights

from casp.backend import load_backend
from casp.budget import matrices, plan_bytes, uniform_plan
from casp.models import Decoder, _factory

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


REAL = {
    "Llama-2-7B": (lambda: T.LlamaConfig(**LLAMA_7B), LLAMA_7B),
    "LLaVA-1.5-7B": (lambda: T.LlavaConfig(clip(), T.LlamaConfig(**LLAMA_7B)), LLAMA_7B),
    "LLaVA-1.5-13B": (lambda: T.LlavaConfig(clip(), T.LlamaConfig(**LLAMA_13B)), LLAMA_13B),
    "LLaVA-NeXT-Mistral-7B": (lambda: T.LlavaNextConfig(clip(), T.MistralConfig(**MISTRAL_7B)), MISTRAL_7B),
    "LLaVA-NeXT-Vicuna-13B": (lambda: T.LlavaNextConfig(clip(), T.LlamaConfig(**LLAMA_13B)), LLAMA_13B),
    "LLaVA-NeXT-Video-7B": (lambda: T.LlavaNextVideoConfig(clip(), T.LlamaConfig(**LLAMA_7B)), LLAMA_7B),
    "LLaVA-OneVision-7B": (
        lambda: T.LlavaOnevisionConfig(T.SiglipVisionConfig(**SIGLIP_27), T.Qwen2Config(**QWEN2_7B)),
        QWEN2_7B,
    ),
    "Qwen2.5-VL-7B": (lambda: T.Qwen2_5_VLConfig(text_config=QWEN2_7B | MROPE), QWEN2_7B),
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


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_real_config_opens_with_exact_bytes(name, tmp_path):
    make, shape = REAL[name]
    decoder = Decoder(empty_checkpoint(make(), tmp_path))
    hidden, inner, depth = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    keys = hidden * shape.get("num_key_value_heads", shape["num_attention_heads"]) // shape["num_attention_heads"]
    block = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    block += [(inner, hidden), (inner, hidden), (hidden, inner)]
    assert len(decoder.blocks) == depth
    assert decoder.share() == 1
    weights = depth * sum(rows * columns for rows, columns in block)
    assert decoder.original_weights() == weights
    shapes = matrices(decoder)
    gptq = load_backend("gptq")
    format = next(one for one in gptq.formats(hidden, hidden) if one["bits"] == 2 and one["group_size"] == 128)
    # 2 bits a code, 2 a zero and 16 a scale for every group of 128: all these widths are multiples of 128 and of 32.
    assert plan_bytes(uniform_plan(decoder, format), shapes, gptq) * 8 == weights * (2 + 18 / 128)
    quip = load_backend("quip-sharp")
    format = next(one for one in quip.formats(hidden, hidden, codebook="e8p") if one["bits"] == 2)
    # 2 bits a code, a sign for every row and column, and a scale of 4 bytes a matrix.
    signs = depth * sum(rows + columns for rows, columns in block)
    assert plan_bytes(uniform_plan(decoder, format), shapes, quip) == weights // 4 + signs // 8 + 4 * len(shapes)
