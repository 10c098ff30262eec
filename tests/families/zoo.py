"""Tiny random models of every family, each with a batch of what it takes: text, pictures, video."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as T
from torch import Tensor, nn

Batch = dict[str, Tensor]

BASE = {"vocab_size": 136, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = BASE | {
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
HALF_ROPE = {"rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}}
VL_IDS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 48}
QWEN3_TOWER = QWEN_TOWER | {
    "num_position_embeddings": 16,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
HYBRID = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GLM_EXPERTS = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1}
GLM_IDS = {
    "image_token_id": 3,
    "video_token_id": 4,
    "image_start_token_id": 5,
    "image_end_token_id": 6,
    "video_start_token_id": 7,
    "video_end_token_id": 101,
}
FALCON = BASE | {"ffn_hidden_size": 96, "max_position_embeddings": 256}
MLA = {
    "num_key_value_heads": 4,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
CLIP, SIGLIP = T.CLIPVisionConfig(**VISION), T.SiglipVisionConfig(**VISION)


@dataclass(frozen=True)
class Family:
    """make: the model; batch: what it is calibrated on; inputs: what that holds; fast: in the tests of every day."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    inputs: str = "text"
    fast: bool = False

    def save(self, folder: Path) -> Path:
        """A checkpoint with weights large enough that every part of a block matters."""
        torch.manual_seed(0)
        model = self.make().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.1)
                elif "sinks" in name:
                    parameter.normal_(0, 1)
        model.save_pretrained(folder)
        return folder


def words(tokens: int = 20) -> tuple[Tensor, Batch]:
    """Ids of two sequences of text, and a batch of them, of which the second is padded at its end."""
    ids = torch.randint(8, 100, (2, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    return ids, {"input_ids": ids, "attention_mask": mask}


def text() -> Batch:
    return words()[1]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def picture(tokens: int, **more: Tensor) -> Batch:
    """A 32x32 picture in each sequence, `tokens` image tokens."""
    ids, batch = words(tokens + 12)
    ids[:, 2 : 2 + tokens] = 3
    return batch | {"pixel_values": noise(2, 3, 32, 32)} | more


def tiled(tokens: int, tiles: int) -> Batch:
    """As `picture`, the picture with its tiles on an axis of their own, as LLaVA-NeXT has it."""
    return picture(tokens) | {"pixel_values": noise(2, tiles, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * 2)}


def clip(tokens: int, frames: int) -> Batch:
    """A video of `frames` frames in each sequence."""
    ids, batch = words(tokens + 12)
    ids[:, 2 : 2 + tokens] = 4
    return batch | {"pixel_values_videos": noise(2, frames, 3, 32, 32)}


def grid(patch: int, video: bool, types: bool = True) -> Batch:
    """A picture of 4 tokens and perhaps a video of 4 in each sequence, as Qwen-VL has them."""
    ids, batch = words(24)
    ids[:, 3], ids[:, 4:8], ids[:, 8] = 5, 3, 6
    batch |= {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "pixel_values": noise(32, 3 * 2 * patch**2)}
    if video:
        ids[:, 10], ids[:, 11:15], ids[:, 15] = 5, 4, 6
        batch |= {"video_grid_thw": torch.tensor([[1, 4, 4]] * 2), "pixel_values_videos": noise(32, 3 * 2 * patch**2)}
    if types:
        batch["mm_token_type_ids"] = (ids == 3).int() + 2 * (ids == 4).int()
    return batch


def crossed() -> Batch:
    """A picture that only the blocks of cross-attention read (Mllama)."""
    ids, batch = words()
    ids[:, 1] = 3
    seen = torch.ones(2, 20, 1, 1, dtype=torch.long)
    seen[:, 0] = 0
    return batch | {
        "pixel_values": noise(2, 1, 1, 3, 32, 32),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": seen,
    }


def causal(name: str, config: str, **settings: object) -> Callable[[], nn.Module]:
    """A language model by the names that transformers gives it."""
    return lambda: getattr(T, f"{name}ForCausalLM")(getattr(T, config)(**settings))


def seeing(name: str, **settings: object) -> Callable[[], nn.Module]:
    """An image-text model by the name that transformers gives it."""
    return lambda: getattr(T, f"{name}ForConditionalGeneration")(getattr(T, f"{name}Config")(**settings))


LLAMA, QWEN2 = T.LlamaConfig(**TEXT), T.Qwen2Config(**TEXT)
MLLAMA_TOWER = {
    "hidden_size": 32,
    "attention_heads": 2,
    "num_hidden_layers": 2,
    "num_global_layers": 1,
    "intermediate_size": 48,
    "vision_output_dim": 64,
    "image_size": 32,
    "patch_size": 8,
    "max_num_tiles": 1,
    "intermediate_layers_indices": [0],
    "supported_aspect_ratios": [[1, 1]],
}
GLM_TOWER = QWEN_TOWER | {"image_size": 32, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
NEXT = {"vision_config": CLIP, "text_config": LLAMA, "image_token_index": 3, "image_grid_pinpoints": [[32, 32]]}

FAMILIES = {
    "llama": Family(causal("Llama", "LlamaConfig", **TEXT), text),
    "mistral": Family(causal("Mistral", "MistralConfig", **TEXT, sliding_window=8), text),
    "qwen2": Family(causal("Qwen2", "Qwen2Config", **TEXT), text),
    "qwen3": Family(causal("Qwen3", "Qwen3Config", **TEXT, head_dim=24), text),
    "gemma2": Family(causal("Gemma2", "Gemma2Config", **TEXT, head_dim=16, sliding_window=8), text),
    "gemma3_text": Family(causal("Gemma3", "Gemma3TextConfig", **TEXT, head_dim=16, sliding_window=8), text),
    "olmo2": Family(causal("Olmo2", "Olmo2Config", **TEXT), text),
    "phi": Family(causal("Phi", "PhiConfig", **TEXT), text),
    "phi3": Family(causal("Phi3", "Phi3Config", **TEXT), text, fast=True),
    "gpt_neox": Family(
        causal("GPTNeoX", "GPTNeoXConfig", **BASE, intermediate_size=96, max_position_embeddings=256), text
    ),
    "opt": Family(
        causal("OPT", "OPTConfig", **BASE, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=256), text
    ),
    "falcon": Family(causal("Falcon", "FalconConfig", **FALCON), text),
    "falcon-40b": Family(
        causal("Falcon", "FalconConfig", **FALCON, num_kv_heads=2, new_decoder_architecture=True), text
    ),
    "bloom": Family(causal("Bloom", "BloomConfig", vocab_size=128, hidden_size=64, n_layer=2, n_head=4), text),
    "mixtral": Family(causal("Mixtral", "MixtralConfig", **TEXT, num_local_experts=4), text),
    "qwen3_moe": Family(causal("Qwen3Moe", "Qwen3MoeConfig", **TEXT, **EXPERTS, head_dim=16, num_experts=4), text),
    "granitemoe": Family(
        causal("GraniteMoe", "GraniteMoeConfig", **TEXT, num_local_experts=4, num_experts_per_tok=2), text
    ),
    "gpt_oss": Family(
        causal(
            "GptOss",
            "GptOssConfig",
            **TEXT,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
        ),
        text,
        fast=True,
    ),
    "deepseek_v2": Family(causal("DeepseekV2", "DeepseekV2Config", **(TEXT | GLM_EXPERTS | MLA)), text),
    "qwen3_5_text": Family(causal("Qwen3_5", "Qwen3_5TextConfig", **TEXT, **HYBRID), text),
    "llama4_text": Family(
        causal("Llama4", "Llama4TextConfig", **TEXT, head_dim=16, num_local_experts=2, intermediate_size_mlp=96), text
    ),
    "llava": Family(
        seeing("Llava", vision_config=CLIP, text_config=LLAMA, image_token_index=3, image_seq_length=16),
        lambda: picture(16),
        "image",
    ),
    "llava_next": Family(seeing("LlavaNext", **NEXT), lambda: tiled(36, 2), "image"),
    "llava_next_video": Family(seeing("LlavaNextVideo", **NEXT, video_token_index=4), lambda: clip(8, 2), "video"),
    "llava_onevision": Family(
        seeing(
            "LlavaOnevision",
            vision_config=SIGLIP,
            text_config=QWEN2,
            image_token_index=3,
            video_token_index=4,
            image_grid_pinpoints=[[32, 32]],
        ),
        lambda: clip(9, 2),
        "video",
    ),
    "qwen2_vl": Family(
        seeing(
            "Qwen2VL",
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
            text_config=TEXT | MROPE,
            **VL_IDS,
        ),
        lambda: grid(14, True),
        "image, video",
    ),
    "qwen2_5_vl": Family(
        seeing(
            "Qwen2_5_VL",
            vision_config=QWEN_TOWER | {"fullatt_block_indexes": [1]},
            text_config=TEXT | MROPE,
            **VL_IDS,
        ),
        lambda: grid(14, True),
        "image, video",
    ),
    "qwen3_vl": Family(
        seeing(
            "Qwen3VL",
            vision_config=QWEN3_TOWER | {"deepstack_visual_indexes": [0]},
            text_config=TEXT | MROPE | {"head_dim": 16},
            **VL_IDS,
        ),
        lambda: grid(8, True),
        "image, video",
        fast=True,
    ),
    "qwen3_vl_moe": Family(
        seeing(
            "Qwen3VLMoe",
            vision_config=QWEN3_TOWER | {"deepstack_visual_indexes": [0]},
            text_config=TEXT | MROPE | EXPERTS | {"head_dim": 16, "num_experts": 4},
            **VL_IDS,
        ),
        lambda: grid(8, True),
        "image, video",
    ),
    "qwen3_5": Family(
        seeing("Qwen3_5", vision_config=QWEN3_TOWER, text_config=TEXT | MROPE | HYBRID, **VL_IDS),
        lambda: grid(8, True),
        "image, video",
    ),
    "qwen3_5_moe": Family(
        seeing(
            "Qwen3_5Moe",
            vision_config=QWEN3_TOWER,
            text_config=TEXT | MROPE | HYBRID | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32},
            **VL_IDS,
        ),
        lambda: grid(8, True),
        "image, video",
    ),
    "gemma3": Family(
        seeing(
            "Gemma3",
            vision_config=SIGLIP,
            text_config=T.Gemma3TextConfig(**TEXT, head_dim=16),
            mm_tokens_per_image=4,
            image_token_index=3,
            boi_token_index=5,
            eoi_token_index=6,
        ),
        lambda: (b := picture(4)) | {"token_type_ids": (b["input_ids"] == 3).int()},
        "image",
    ),
    "internvl": Family(
        seeing(
            "InternVL",
            vision_config=VISION | {"image_size": [32, 32], "patch_size": [8, 8]},
            text_config=QWEN2,
            image_token_id=3,
        ),
        lambda: picture(4),
        "image",
    ),
    "paligemma": Family(
        seeing(
            "PaliGemma",
            vision_config=VISION | {"model_type": "siglip_vision_model", "projection_dim": 64},
            text_config=TEXT | {"model_type": "gemma", "head_dim": 16},
            projection_dim=64,
            image_token_index=3,
        ),
        lambda: (b := picture(16)) | {"token_type_ids": torch.zeros_like(b["input_ids"])},
        "image",
    ),
    "mistral3": Family(
        seeing(
            "Mistral3",
            vision_config=VISION | {"model_type": "pixtral", "head_dim": 16},
            text_config=TEXT | {"model_type": "mistral", "head_dim": 16},
            image_token_index=3,
        ),
        lambda: picture(4, image_sizes=torch.tensor([[32, 32]] * 2)),
        "image",
    ),
    "smolvlm": Family(
        seeing(
            "SmolVLM",
            vision_config=VISION,
            text_config=TEXT | {"model_type": "llama"},
            image_token_id=3,
            scale_factor=2,
            pad_token_id=0,
        ),
        lambda: picture(4) | {"pixel_values": noise(2, 1, 3, 32, 32)},
        "image",
    ),
    "mllama": Family(
        seeing(
            "Mllama",
            vision_config=MLLAMA_TOWER,
            text_config=TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
            image_token_index=3,
        ),
        crossed,
        "image",
    ),
    "aria": Family(
        seeing(
            "Aria",
            vision_config=VISION | {"model_type": "idefics3_vision"},
            text_config=TEXT
            | {"model_type": "aria_text", "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
            projector_patch_to_query_dict={16: 4},
            image_token_index=3,
        ),
        lambda: picture(4, pixel_mask=torch.ones(2, 32, 32, dtype=torch.bool)),
        "image",
    ),
    "glm4v_moe": Family(
        seeing(
            "Glm4vMoe",
            vision_config=GLM_TOWER,
            text_config=TEXT | HALF_ROPE | GLM_EXPERTS | {"head_dim": 16, "topk_group": 1},
            **GLM_IDS,
        ),
        lambda: grid(8, False),
        "image",
    ),
    "ernie4_5_vl_moe": Family(
        seeing(
            "Ernie4_5_VLMoe",
            vision_config=QWEN_TOWER | {"patch_size": 8, "spatial_merge_size": 2, "temporal_merge_size": 2},
            text_config=TEXT
            | {
                "rope_parameters": {"rope_type": "default", "mrope_section": [3, 3, 2], "rope_theta": 1e4},
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_intermediate_size": [32, 16],
                "moe_num_shared_experts": 1,
                "mlp_layer_types": ["dense", "sparse"],
            },
            **GLM_IDS,
        ),
        lambda: (
            (b := grid(8, False)) | {"pixel_values": noise(32, 3 * 64), "moe_mm_token_type_ids": b["mm_token_type_ids"]}
        ),
        "image",
    ),
}
