"""The knobs of GPTQ's search."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Search:
    """How GPTQ looks for codes, see `casp_gptq.gptq.gptq_quantize`.

    symmetric: a grid about zero, without zero points; act_order: round the columns with the largest inputs first;
    damping: on the Hessian's diagonal, a share of its mean; clip_steps: of a group's range; sweeps:
    rounds of refinement after GPTQ's own pass.
    """

    symmetric: bool = False
    act_order: bool = True
    damping: float = 0.01
    clip_steps: int = 20
    sweeps: int = 2

    def record(self) -> dict[str, Any]:
        """All knobs, as `GPTQ.quantize` takes them."""
        return asdict(self)
