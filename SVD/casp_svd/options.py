"""What the SVD stage is asked to do."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Factoring:
    """How W_q and W_k are factored.

    whitening: what an error of a matrix is measured by ("none", "input", "attention" or "gradient", see --help);
    keep_ratio: share of the weights to keep, in (0, 1]; damping: added to the diagonal of each second moment, in units
    of its mean.
    """

    whitening: str = "attention"
    keep_ratio: float = 0.25
    damping: float = 0.01

    def record(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return asdict(self)
