"""Which tokens of a sequence are text, which stand for pictures and which for video, for every family."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

FIELDS = {"image": ("image_token_id", "image_token_index"), "video": ("video_token_id", "video_token_index")}
"""Modality -> the names under which a config of transformers says which token id stands for one of its features."""


@dataclass(frozen=True)
class Visual:
    """How much of pictures and videos enters a sample: frames of a video, and the most tokens for all of them."""

    frames: int = 8
    tokens: int = 4096


def is_multimodal(config: Any) -> bool:
    """Whether transformers loads this configuration as an image-text-to-text model."""
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def cross_attends(config: Any) -> bool:
    """Whether some blocks read a picture's states beside the sequence (Mllama): without a picture they do not run."""
    return bool(getattr(config.get_text_config(), "cross_attention_layers", None))


def token_ids(config: Any) -> dict[str, frozenset[int]]:
    """Modality -> the token ids that stand for it, none where the model has none.

    Families that give frames to the language model as pictures (InternVL, SmolVLM) have one id for both, "image".
    """
    found = {}
    for kind, names in FIELDS.items():
        values = (getattr(config, name, None) for name in names)
        found[kind] = frozenset(value for value in values if type(value) is int)
    return found


def visual_tokens(ids: Tensor, config: Any) -> dict[str, Tensor]:
    """ "image" and "video" -> where such a token stands, bool of the shape of `ids`."""
    return {
        kind: torch.isin(ids, torch.tensor(sorted(values), dtype=ids.dtype))
        for kind, values in token_ids(config).items()
    }
