"""From the last block's hidden states to logits: the final norm and the head, as the model itself computes them."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from casp.model.decoder import Decoder
from casp.model.inputs import PassedOver

POSITIONS = 256  # whose logits are in memory together: a vocabulary is a hundred times wider than a block


def head_logits(decoder: Decoder, hidden: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
    """Logits (tokens, vocabulary) for what the last block puts out, `hidden` (tokens, hidden size).

    The model itself computes them, whatever its norm, head, scaling and caps are, with its blocks passed over and
    `tensors` in place of its own of these names; everything outside the blocks must be loaded.
    """
    hidden = hidden[None]

    def passed_over(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden.as_subclass(PassedOver)

    for block in decoder.block_list:
        block.forward = passed_over
    try:
        given = {"inputs_embeds": torch.zeros_like(hidden), "use_cache": False}
        return functional_call(decoder.model, dict(tensors or {}), (), given).logits[0]
    finally:
        for block in decoder.block_list:
            del block.__dict__["forward"]
