"""Block influence: how much a block changes what goes through it."""

import math

from torch import Tensor
from torch.nn import functional as F

from casp.errors import UserError


class BlockInfluence:
    """The running `1 - E[cos(x_l, x_{l+1})]` over tokens (ShortGPT, arXiv 2403.03853)."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def add(self, entered: Tensor, left: Tensor, tokens: Tensor) -> None:
        """Hidden states before and after a block, (batch, tokens, hidden); tokens: (batch, tokens), False = padding."""
        cosine = F.cosine_similarity(entered.float(), left.float(), dim=-1)
        self._total += cosine[tokens].double().sum().item()
        self._count += int(tokens.sum())

    def state(self) -> list[float]:
        """What was added, JSON-able, for `absorb`."""
        return [self._total, self._count]

    def absorb(self, state: list[float]) -> None:
        """Add what another has added."""
        self._total += state[0]
        self._count += state[1]

    def value(self, index: int) -> float:
        """The influence of what was added, block `index`: 0 for one that changes nothing. UserError for NaN."""
        if not math.isfinite(self._total):
            raise UserError(f"block {index} puts out NaN or infinity; check its weights, or run in a wider --dtype.")
        return 1 - self._total / self._count
