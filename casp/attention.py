"""An attention implementation that lets a stage see queries, keys and probabilities.

transformers routes every attention of a model through a registered function; the one registered here as
"casp" computes exactly what "sdpa" computes and, while a module is observed, shows its operands. So no
attention class is rewritten, and what is seen is what meets in the logits: after the rotary embedding and
after any query/key norm, for any architecture that uses the interface.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "casp"


@dataclass
class AttentionCall:
    """Operands of one attention call.

    query: (batch, heads, tokens, head_dim), key: (batch, key_value_heads, tokens, head_dim), both as they
    meet in the logits; mask: boolean or additive, broadcastable to (batch, heads, tokens, tokens), or None
    for a plain causal mask; scaling: the factor on the logits; softcap: the bound that Gemma 2 puts on them.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None

    def probabilities(self, head: int) -> Tensor:
        """Attention probabilities of one query head, (batch, tokens, tokens) in float32.

        One head at a time, because a map over all heads of a long sequence is the largest tensor of a walk.
        """
        group = self.query.shape[1] // self.key.shape[1]
        query, key = self.query[:, head].float(), self.key[:, head // group].float()
        logits = query @ key.transpose(-1, -2) * self.scaling
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        tokens = logits.shape[-1]
        mask = self.mask
        if mask is None:
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=logits.device).tril()
        else:
            mask = mask[:, head if mask.shape[1] > 1 else 0, :, :tokens]
        visible = mask if mask.dtype == torch.bool else mask > float("-inf")
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.float()
        # A row of padding attends to nothing; its softmax would be NaN. Any other NaN is the model's, and stays.
        return torch.softmax(logits, dim=-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)

    def visible(self) -> Tensor:
        """Which keys each query may see, (batch, tokens, tokens) bool.

        Read off the probabilities of a query of zeros: those are 0 behind the mask alone, whatever form it has.
        """
        blank = replace(self, query=torch.zeros_like(self.query[:, :1]), key=torch.zeros_like(self.key[:, :1]))
        return blank.probabilities(0) > 0


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = AttentionCall(query, key, attention_mask, factor, kwargs.get("softcap"))
    observer = getattr(module, "attention_observer", None)
    if observer is not None:
        observer(call)
    if call.softcap is not None:
        return _softcapped(call, value), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _softcapped(call: AttentionCall, value: Tensor) -> Tensor:
    """Attention with bounded logits, which the fused kernel does not know; (batch, tokens, heads, head_dim)."""
    heads = range(call.query.shape[1])
    group = len(heads) // value.shape[1]
    rows = [call.probabilities(head).to(value.dtype) @ value[:, head // group] for head in heads]
    return torch.stack(rows, dim=2)


@contextmanager
def observe_attention(block: nn.Module, observer: Callable[[AttentionCall], None]) -> Iterator[None]:
    """While open, `observer` receives an AttentionCall for every attention inside `block`."""
    modules = list(block.modules())
    for module in modules:
        module.attention_observer = observer
    try:
        yield
    finally:
        for module in modules:
            del module.attention_observer


def register() -> None:
    """Make "casp" known to transformers as an attention implementation (done by `import casp`)."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
