"""The knobs of QuIP#'s search."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Search:
    """How QuIP# looks for codes, see `casp_quip_sharp.quantize.quantize_matrix`.

    damping: on the Hessian's diagonal, a share of its mean; search_scale: compare scales under the weighted loss;
    sweeps: most rounds of coordinate descent after LDLQ.
    """

    damping: float
    search_scale: bool
    sweeps: int

    def record(self) -> dict[str, Any]:
        """All knobs, as `QuipSharp.quantize` takes them."""
        return asdict(self)
