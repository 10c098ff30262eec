"""Negative log-likelihoods of chosen tokens, without ever holding the logits of a whole batch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ROWS = 256
"""Positions whose logits exist at one time: 256 rows of a vocabulary of 50,000 take 50 MB in float32."""


@torch.inference_mode()
def token_losses(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor, keep: Tensor) -> Tensor:
    """-ln p(targets[b, t] | tokens up to t of row b) at the positions where `keep` is true.

    inputs: keyword arguments of the model (batch, time); targets: token ids (batch, time); keep: bool
    (batch, time). Returns float32 (number of kept positions,), in row-major order.

    The logits are most of the memory (batch x time x vocabulary) and most of them are not needed. The model
    therefore runs once with only one position let through to its head; the head is then applied to the kept
    positions, ROWS at a time. Some models change the logits after the head (soft-capping, scaling): that one
    position tells, and such a model is run again with the kept positions passing through all of it.
    """
    head = model.get_output_embeddings()
    seen: list[Tensor] = []

    def first_only(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
        seen.append(arguments[0])
        return (arguments[0][:1, :1],)

    with _before(head, first_only):
        own = model(**inputs, use_cache=False).logits
    rows, wanted = seen[0][keep], targets[keep]
    plain = torch.equal(own[0, 0], head(seen[0][:1, :1])[0, 0])
    if not plain:
        with _before(head, lambda _, arguments: (arguments[0][keep][None],)):
            logits = model(**inputs, use_cache=False).logits[0]
        parts = zip(logits.split(ROWS), wanted.split(ROWS), strict=True)
        return torch.cat([functional.cross_entropy(a.float(), b, reduction="none") for a, b in parts])
    parts = zip(rows.split(ROWS), wanted.split(ROWS), strict=True)
    return torch.cat([functional.cross_entropy(head(a).float(), b, reduction="none") for a, b in parts])


class _before:
    """`with _before(module, hook)`: the hook sees, and may replace, the module's inputs inside the block."""

    def __init__(self, module: nn.Module, hook: Any) -> None:
        self.module, self.hook = module, hook

    def __enter__(self) -> None:
        self.handle = self.module.register_forward_pre_hook(self.hook)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
