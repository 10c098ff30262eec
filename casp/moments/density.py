"""Attention density: the share of the attention map that is in use, the observation that CASP builds on."""

import numpy as np
import torch
from torch import Tensor

from casp.model.attention import AttentionCall
from casp.model.inputs import BatchInputs
from casp.walk import Visit

MASS = 0.95
SAMPLES = 64  # chats differ: means over 16 of them lie 30 points apart in some blocks of demo-llava
_QUERIES = 64  # of each sequence, evenly spaced: to sort every row would take longer than all the rest


def _falling(rows: Tensor) -> Tensor:
    """Each of `rows` (..., n) sorted, the largest first."""
    if rows.device.type == "cpu":  # numpy's sort keeps no order of places, and so takes far less time
        return torch.from_numpy(np.sort(rows.numpy(), axis=-1)).flip(-1)
    return rows.sort(dim=-1, descending=True)[0]


def _in_use(probabilities: Tensor) -> Tensor:
    """Which of each row (..., n) are the fewest that hold `MASS` together: bool; of equal ones the first."""
    ordered = _falling(probabilities)
    needed = (ordered.cumsum(-1) - ordered < MASS).sum(-1, keepdim=True)
    least = ordered.gather(-1, (needed - 1).clamp_min(0))  # of NaN none are needed: others say what is wrong
    larger, equal = probabilities > least, probabilities == least
    return larger | (equal & (equal.cumsum(-1) <= needed - larger.sum(-1, keepdim=True)))


class AttentionDensity:
    """Share of the attention entries in use, for image, video and text keys.

    An entry (query, head, key that the query may see) is in use when it belongs to the fewest that together
    hold 95% of the query's attention; of equal ones the first. The paper's density is the share of entries that
    are not zero; after a softmax none is, so the rest of 5% counts as zero. Measured at evenly spaced queries.
    """

    def __init__(self) -> None:
        self._used = dict.fromkeys(("image", "video", "text"), 0)
        self._visible = dict.fromkeys(self._used, 0)

    def add(self, call: AttentionCall, batch: BatchInputs) -> None:
        """Count the entries of one call of the attention."""
        if not call.reads_itself:
            return
        tokens = call.query.shape[2]
        rows = torch.linspace(0, tokens - 1, min(tokens, _QUERIES), device=call.query.device).long()
        masks = {"image": batch.images, "video": batch.videos, "text": ~batch.images & ~batch.videos}
        may_see = call.visible(rows) & batch.tokens[:, rows, None]
        entries = {kind: (mask & batch.tokens)[:, None, :] & may_see for kind, mask in masks.items()}
        heads, visible = call.query.shape[1], {kind: int(of_kind.sum()) for kind, of_kind in entries.items()}
        for kind, count in visible.items():
            self._visible[kind] += heads * count
        for head in range(heads):
            in_use = _in_use(call.probabilities(head, rows))
            for kind in (kind for kind, count in visible.items() if count):
                self._used[kind] += int((in_use & entries[kind]).sum())

    def state(self) -> list[dict[str, int]]:
        """What was counted, JSON-able, for `absorb`."""
        return [self._used, self._visible]

    def absorb(self, state: list[dict[str, int]]) -> None:
        """Add what another has counted."""
        for mine, others in zip((self._used, self._visible), state, strict=True):
            for kind, count in others.items():
                mine[kind] += count

    def value(self) -> dict[str, float | None]:
        """{"image", "text"}: the shares, None where there was no key of that kind; "video" too where there was one.

        Cross-attention and blocks without attention count for nothing.
        """
        shares = {kind: self._used[kind] / count if count else None for kind, count in self._visible.items()}
        return {kind: share for kind, share in shares.items() if kind != "video" or share is not None}


def influence_and_density(visit: Visit, batches: int) -> tuple[float, dict[str, float | None]]:
    """The block influence, and the density of the attention on the first `batches` batches, of all ranks that visit it.

    From one run of the block.
    """
    ranks, found, mine = visit.ranks, AttentionDensity(), AttentionDensity()
    left, last = len(ranks.mine(batches)), None

    def look(call: AttentionCall, batch: BatchInputs) -> None:
        nonlocal left, last
        if batch is not last:
            left, last = left - 1, batch
        if left >= 0:
            mine.add(call, batch)

    influence = visit.block_influence(look)
    for state in ranks.gathered(mine.state()):
        found.absorb(state)
    return influence, found.value()


def density_batches(batch_size: int) -> int:
    """How many batches hold the 64 samples that the density is measured on."""
    return -(-SAMPLES // batch_size)
