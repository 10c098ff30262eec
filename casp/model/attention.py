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
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "casp"


ROWS = 256  # queries whose attention is in memory together
MOST_MASK = 1 << 26  # bytes of a mask of floats; a larger one is made for ROWS queries at a time


@dataclass
class AttentionCall:
    """Operands of one attention call.

    query: (batch, heads, queries, head_dim), key: (batch, key_value_heads, keys, head_dim), both as they
    meet in the logits; mask: boolean or additive, broadcastable to (batch, heads, queries, keys), or None
    for a plain causal mask (for none where queries and keys are not the same sequence); scaling: the factor on the
    logits; softcap: the bound that Gemma 2 puts on them; sinks: (heads,), the logits of a key without a value that
    gpt-oss adds to each row.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def reads_itself(self) -> bool:
        """Whether the keys are the sequence of the queries: False for cross-attention."""
        return self.query.shape[2] == self.key.shape[2]

    def probabilities(self, head: int, rows: slice | Tensor = slice(None)) -> Tensor:
        """Attention probabilities of one query head at the queries `rows`, (batch, rows, keys) in float32.

        One head at a time, and of a long sequence a few queries: a whole map is the largest tensor of a walk.
        """
        group = self.query.shape[1] // self.key.shape[1]
        query, key = self.query[:, head, rows].float(), self.key[:, head // group].float()
        logits = query @ key.transpose(-1, -2) * self.scaling
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        keys = logits.shape[-1]
        mask = self.mask
        if mask is not None:
            mask = mask[:, head if mask.shape[1] > 1 else 0, :, :keys]
            mask = mask[:, rows] if mask.shape[1] > 1 else mask
        elif self.reads_itself:
            places = torch.arange(keys, device=logits.device)
            mask = places[rows][:, None] >= places
        else:
            mask = torch.ones(1, keys, dtype=torch.bool, device=logits.device)
        visible = mask if mask.dtype == torch.bool else mask > float("-inf")
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.float()
        if self.sinks is not None:
            sink = self.sinks[head].float().expand(*logits.shape[:-1], 1)
            found = torch.softmax(torch.cat([logits, sink], dim=-1), dim=-1)[..., :-1]
        else:
            found = torch.softmax(logits, dim=-1)
        # A row of padding attends to nothing; its softmax would be NaN. Any other NaN is the model's, and stays.
        return found.masked_fill(~visible.any(-1, keepdim=True), 0.0)

    def visible(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Which keys each of the queries `rows` may see, (batch, rows, keys) bool.

        Read off the probabilities of a query of zeros: those are 0 behind the mask alone, whatever form it has.
        """
        blank = replace(self, query=torch.zeros_like(self.query[:, :1]), key=torch.zeros_like(self.key[:, :1]))
        return replace(blank, sinks=None).probabilities(0, rows) > 0

    def row_blocks(self) -> Iterator[slice]:
        """The queries a few at a time, in order."""
        queries = self.query.shape[2]
        return (slice(first, min(first + ROWS, queries)) for first in range(0, queries, ROWS))


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
    sinks = kwargs.pop("s_aux", None)
    call = AttentionCall(query, key, attention_mask, factor, kwargs.get("softcap"), sinks)
    observer = getattr(module, "attention_observer", None)
    if observer is not None:
        observer(call)
    if call.softcap is not None or call.sinks is not None:
        return _explicit(call, value), None

    def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)[0]

    if attention_mask is None or 4 * attention_mask.numel() <= MOST_MASK or attention_mask.shape[2] == 1:
        return fused(query, key, value, attention_mask), None
    # The fused kernel makes a mask of floats of any other, for all the queries that it is given.
    parts = [(query[:, :, rows], key, value, attention_mask[:, :, rows]) for rows in call.row_blocks()]
    again = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    done = (checkpoint(fused, *part, use_reentrant=False) if again else fused(*part) for part in parts)
    return torch.cat(list(done), dim=1), None


def _explicit(call: AttentionCall, value: Tensor) -> Tensor:
    """Attention with bounded logits or sinks, which the fused kernel does not know; (batch, queries, heads, head_dim).

    A few queries at a time, so that no whole map is in memory (unless gradients are wanted, which need it).
    """
    heads = range(call.query.shape[1])
    group = len(heads) // value.shape[1]

    def one(head: int) -> Tensor:
        parts = (call.probabilities(head, rows).to(value.dtype) @ value[:, head // group] for rows in call.row_blocks())
        return torch.cat(list(parts), dim=1)

    return torch.stack([one(head) for head in heads], dim=2)


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
