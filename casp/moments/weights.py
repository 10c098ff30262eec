"""How much a token counts in a second moment: all the same, by the attention it gets, or by the loss's gradient.

The squared norm of a linear's output gradient is the weight under which an error of its output costs what it changes
in the loss, once rows are alike (an output rotation sees to that): `E[(g^T D x)^2]` becomes `E[|g|^2 |D x|^2] / out`.
The same idea bears the names GuidedQuant (arXiv 2505.07004) and, for image tokens, VLMQ (arXiv 2508.03351).
"""

import torch
from torch import Tensor

from casp.errors import UserError
from casp.model.attention import AttentionCall

EXPLAINED = {
    "none": "all tokens the same",
    "attention": "as much as the attention that a token gets in the block, in units of uniform attention, at most 4",
    "gradient": "by the squared norm of the loss's gradient at the linear's own output, in units of its mean over the "
    "sequence, at most 20",
    "gradient-norm": "by that norm itself, at most 10 times the mean",
}
"""The ways of weighing a token, by name."""

USUAL = ("none", "attention", "gradient")
"""What is collected where nothing else is asked for."""

_MOST_ATTENTION = 4.0  # the first token of a text draws a hundred times its share and says nothing
_MOST_SQUARE = 40.0
_MOST_ENERGY = 4.0
_MOST_GRADIENT = {"gradient": 20.0, "gradient-norm": 10.0}  # heavy tails waste samples


def weighting_parts(weighting: str) -> tuple[str, ...]:
    """The names that a weighting is made of: "attention+gradient" is the sum of two. UserError for an unknown one."""
    parts = tuple(weighting.split("+"))
    unknown = [part for part in parts if part not in EXPLAINED]
    if unknown or len(set(parts)) < len(parts):
        wrong = f"{unknown[0]!r} is not one" if unknown else "one is given twice"
        raise UserError(
            f"--token-weights {weighting}: {wrong} of {', '.join(EXPLAINED)}; join several different ones by +."
        )
    return parts


def by_gradient(part: str) -> bool:
    """Whether the weights called `part` come from the loss's gradient: they differ from linear to linear."""
    return part in _MOST_GRADIENT


def attention_received(call: AttentionCall, tokens: Tensor) -> Tensor:
    """How much attention each token gets, in units of what it would get if all attention were uniform.

    tokens: (batch, tokens) bool, False for padding. Returns (batch, tokens), `sum_i p_ij / sum_i 1 / n_i` over the
    queries i, the mean of all heads, where n_i keys are visible to query i; no more than 4, and padding counts neither
    as query nor as key. Memory: a few rows of one head's map. All 1 for cross-attention, whose keys are no tokens.
    """
    heads, length = call.query.shape[1:3]
    received = torch.zeros(tokens.shape, dtype=torch.float32, device=call.query.device)
    if not call.reads_itself:
        return torch.ones_like(received)
    uniform = torch.zeros_like(received)
    for rows in call.row_blocks():
        queries = tokens[:, rows, None].float()
        for head in range(heads):
            received += torch.where(queries > 0, call.probabilities(head, rows), 0.0).sum(1)
        visible = call.visible(rows).float()
        uniform += (visible / visible.sum(-1, keepdim=True).clamp_min(1) * queries).sum(1)
    return (received / (heads * uniform).clamp_min(1 / length)).clamp_max(_MOST_ATTENTION)


def checked_attention(call: AttentionCall, tokens: Tensor, index: int) -> Tensor:
    """As `attention_received`, in block `index`; UserError for NaN and infinity."""
    received = attention_received(call, tokens)
    if not torch.isfinite(received[tokens]).all():
        raise UserError(
            f"block {index}: its attention holds NaN or infinity; check the model's weights, or run in a wider --dtype"
        )
    return received


def tempered(gradient: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of each sequence at a mean square of 1, its heaviest tokens bounded, and what that square was.

    gradient: (batch, tokens, out); tokens: (batch, tokens) bool, False for padding. Returns (batch, tokens, out)
    float32 and (batch,). The gradient at a token that all others attend to is hundreds of times that of any other, and
    so is that of some whole sequences: there the expansion to second order predicts a multiple of what an error costs.
    A token's square counts up to 40 times that of the sequence's mean norm.
    """
    gradient = gradient.float() * tokens[..., None]
    tiny, size = torch.finfo(torch.float32).tiny, gradient.square().sum(-1)
    count = tokens.sum(-1).clamp_min(1)
    most = _MOST_SQUARE * (size.sqrt().sum(-1) / count).square()
    kept = (most[:, None] / size.clamp_min(tiny)).clamp_max(1)
    energy = (size * kept).sum(-1) / count
    return gradient * (kept / energy.clamp_min(tiny)[:, None]).sqrt()[..., None], energy


def typical_energy(energies: Tensor, counts: Tensor, chats: Tensor) -> float:
    """The mean of the sequences' `energies`, weighted by their `counts` of tokens, none above 4 times the median.

    All (sequences,); chats: bool, which of them are chats. The median is that of the sequences of the same kind that
    have a loss: a window of text has a loss at every position and hundreds of times the energy of a short answer.
    """
    energies, counts = energies.double(), counts.double()
    total = 0.0
    for kind in (chats, ~chats):
        used = energies[kind & (energies > 0)]
        if len(used):
            total += (energies[kind].clamp_max(_MOST_ENERGY * used.median()) * counts[kind]).sum().item()
    return total / counts.sum().item() if total else 0.0


def gradient_weights(part: str, gradient: Tensor, tokens: Tensor) -> Tensor:
    """The weights "gradient" or "gradient-norm", (batch, tokens) float32; 0 for padding.

    gradient: (batch, tokens, out), of the loss at a linear's output; tokens: (batch, tokens) bool, False for padding.
    Scaled to a mean of 1 over each sequence's tokens, then clipped: no sequence weighs more for being less certain.
    """
    size = gradient.float().square().sum(-1) * tokens
    if part == "gradient-norm":
        size = size.sqrt()
    mean = size.sum(-1, keepdim=True) / tokens.sum(-1, keepdim=True).clamp_min(1)
    # Where no gradient comes (no position with a loss) the mean is 0 and so are all weights.
    return (size / mean.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(_MOST_GRADIENT[part])
