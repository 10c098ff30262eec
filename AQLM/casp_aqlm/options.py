"""The knobs of AQLM's search."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Rounds:
    """How long AQLM alternates between codes and codebooks, see `casp_aqlm.quantize`.

    damping: on the Hessian's diagonal, a share of its mean; tolerance: relative gain of a round below which no other
    follows; max_rounds: the most rounds.
    """

    damping: float = 0.01
    tolerance: float = 0.01
    max_rounds: int = 12

    def record(self) -> dict[str, Any]:
        """All knobs, as `AQLM.quantize` takes them."""
        return asdict(self)
