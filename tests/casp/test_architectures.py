"""Models that nobody wrote a line for: the walk replays each exactly, from its module names alone."""

import pytest
import torch
import transformers as T

from casp.model.capture import capture_inputs
from casp.model.decoder import Decoder
from casp.walk import walk

CPU = torch.device("cpu")
TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
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
VL_IDS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
CLIP = T.CLIPVisionConfig(**VISION)
SIGLIP = T.SiglipVisionConfig(**VISION)
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2}
QWEN25_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 48,
    "fullatt_block_indexes": [1],
}
GEMMA = {"head_dim": 16, "sliding_window": 8}

MODELS = {
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**TEXT, sliding_window=8)),
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**TEXT, **GEMMA, attn_implementation="eager")),
    "gemma3_text": lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**TEXT, **GEMMA)),
    "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**TEXT)),
    "olmo2": lambda: T.Olmo2ForCausalLM(T.Olmo2Config(**TEXT)),
    "opt": lambda: T.OPTForCausalLM(T.OPTConfig(**OPT, num_attention_heads=4, max_position_embeddings=256)),
    "llava_next": lambda: T.LlavaNextForConditionalGeneration(
        T.LlavaNextConfig(vision_config=CLIP, text_config=T.LlamaConfig(**TEXT), image_token_index=3)
    ),
    "llava_onevision": lambda: T.LlavaOnevisionForConditionalGeneration(
        T.LlavaOnevisionConfig(
            vision_config=SIGLIP, text_config=T.Qwen2Config(**TEXT), image_token_index=3, video_token_index=4
        )
    ),
    "qwen2_vl": lambda: T.Qwen2VLForConditionalGeneration(
        T.Qwen2VLConfig(
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
            text_config=TEXT | MROPE,
            **VL_IDS,
        )
    ),
    "qwen2_5_vl": lambda: T.Qwen2_5_VLForConditionalGeneration(
        T.Qwen2_5_VLConfig(vision_config=QWEN25_TOWER, text_config=TEXT | MROPE, **VL_IDS)
    ),
    "gemma3": lambda: T.Gemma3ForConditionalGeneration(
        T.Gemma3Config(
            vision_config=SIGLIP,
            text_config=T.Gemma3TextConfig(**TEXT, head_dim=16),
            mm_tokens_per_image=4,
            image_token_index=3,
            boi_token_index=4,
            eoi_token_index=5,
        )
    ),
    "internvl": lambda: T.InternVLForConditionalGeneration(
        T.InternVLConfig(
            vision_config=VISION | {"image_size": [32, 32], "patch_size": [8, 8]},
            text_config=T.Qwen2Config(**TEXT),
            image_token_id=3,
        )
    ),
}
PLAIN = [{"q", "k", "v"}, {"o"}, {"gate", "up"}, {"down"}]
GROUPS = {
    "opt": [{"q", "k", "v"}, {"o"}, {"up"}, {"down"}],
    "phi3": [{"q", "k", "v"}, {"o"}, {"gate_up_proj"}, {"down"}],
}


def picture_batch(name: str) -> dict[str, torch.Tensor]:
    """Two sequences; for Qwen2.5-VL with a picture in each, whose tokens have positions of their own."""
    ids = torch.randint(8, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "qwen2_5_vl":
        ids[:, 3], ids[:, 4:8], ids[:, 8] = 5, 3, 6
        batch["mm_token_type_ids"] = (ids == 3).int()
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 4, 4]])
        batch["pixel_values"] = torch.randn(32, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))
    return batch


@pytest.mark.parametrize("name", MODELS)
def test_walk_replays(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path)
    decoder = Decoder(tmp_path)
    batch = picture_batch(name)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
    inputs = capture_inputs(decoder, [batch], CPU, torch.float32)
    for visit in walk(decoder, inputs, CPU, torch.float32):
        torch.testing.assert_close(inputs[0].hidden, states[visit.index], atol=1e-5, rtol=1e-4)
        roles = {path: role for role, path in visit.linears.items()}
        groups = [{roles[path] for path in group} for group in visit.input_groups(list(roles))]
        assert groups == GROUPS.get(name, PLAIN)
