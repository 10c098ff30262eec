"""The running second moment of what a linear meets: of its inputs, or of the gradients of its outputs.

Every method here weighs an error ``D`` of a weight by ``tr(D H D^T)`` with ``H = E[x x^T]``, the mean over
the calibration tokens of the outer product of the layer's input (GPTQ, arXiv 2210.17323; CASP, 2503.05936).
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from casp.errors import UserError
from casp.linear import is_finite
from casp.moments.symmetric import mirror_, panels

NOT_FINITE = (
    "the second moment of its inputs holds NaN or infinity; check the model's weights and the calibration data, or run "
    "in a wider --dtype"
)
_ROWS = 512  # of a panel: enough for a matrix product at full speed, few enough to save nearly half of it
WIDEST_DOUBLE = 8192  # up to this width a sum is kept in float64, 0.3 GB of it; beyond it in float32


def sum_dtype(size: int) -> torch.dtype:
    """The dtype in which a second moment of this width is summed and factored."""
    return torch.float64 if size <= WIDEST_DOUBLE else torch.float32


class SecondMoment:
    """The running (weighted) mean of ``x x^T``.

    Only the upper half is computed and kept, in panels of rows. Products are taken in float32 and summed in float64:
    the sum over millions of tokens then keeps the small eigenvalues that whitening and the Cholesky factor need.
    Above a width of 8,192 the sum is in float32 too: 4 bytes x size^2 / 2, 1.6 GB for 28,672.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.count = 0.0
        self._device = torch.device(device)
        self._sums: list[Tensor] = []  # made when something is added: some are added up by other ranks

    @property
    def _panels(self) -> list[Tensor]:
        if not self._sums:
            shapes = [(rows.stop - rows.start, self.size - rows.start) for rows in _panels(self.size)]
            self._sums = [torch.zeros(s, dtype=sum_dtype(self.size), device=self._device) for s in shapes]
        return self._sums

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever added."""
        return not self._sums

    @property
    def counts(self) -> list[float]:
        """As of a `Summands` to which all tokens were added at once."""
        return [self.count]

    @property
    def products(self) -> list[Tensor]:
        """Likewise: the sums themselves, in the dtype that they are kept in."""
        return self._panels

    def forget(self) -> None:
        """Give up what was added, and its memory."""
        self.count, self._sums = 0.0, []

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add the tokens ``x`` (..., size), any float dtype; ``weights`` (...) at least 0, 1 when absent.

        A token of weight 0 (padding) is left out, not multiplied by 0: whatever it holds, NaN included,
        counts for nothing. A weight of NaN is no padding: it makes the mean NaN, which `checked` tells.
        """
        self.absorb(*_products(x, weights, self.size, self._device))

    def absorb(self, count: float, products: Iterable[Tensor]) -> None:
        """Add one `add` of a `Summands`, or what another moment holds: how much it counts, and a product a panel."""
        self.count += count
        for panel, product in zip(self._panels, products, strict=True):
            panel += product.to(panel.device)

    @classmethod
    def total(cls, parts: Sequence["SecondMoment"]) -> "SecondMoment":
        """Of the tokens of all `parts` together, which are of one size."""
        found = cls(parts[0].size, parts[0]._device)
        for part in parts:
            found.count += part.count
            for panel, more in zip(found._panels, part._panels, strict=True):
                panel += more
        return found

    def borrow(self, other: "SecondMoment", tokens: float) -> None:
        """Add so many tokens that are like those of `other` in the mean; nothing where that has none."""
        if not other.count:
            return
        self.count += tokens
        for panel, more in zip(self._panels, other._panels, strict=True):
            panel += more * (tokens / other.count)

    def value(self) -> Tensor:
        """The mean ``E[x x^T]`` (size, size) in the dtype of the sum; all zeros when no token was added."""
        found = self._panels[0].new_empty(self.size, self.size)
        for rows, panel in zip(_panels(self.size), self._panels, strict=True):
            own = len(panel)
            found[rows, rows.start :] = panel / (self.count or 1.0)
            found[rows, rows] = found[rows, rows].triu() + panel[:, :own].triu(1).T / (self.count or 1.0)
            found[rows.stop :, rows] = found[rows, rows.stop :].T
        return found

    def checked(self, name: str) -> Tensor:
        """As `value`; UserError, which calls the moment `name`, for NaN or infinity and where no token counted."""
        if not self.count:
            raise UserError(f"{name}: no calibration token counts for it; give other calibration data")
        found = self.value()
        if not torch.isfinite(found).all():
            raise UserError(f"{name}: {NOT_FINITE}")
        return found

    def triangle(self, name: str = "moment") -> Tensor:
        """The upper half of `value`, row after row, (size (size + 1) / 2,) float32 on the CPU; UserError for NaN."""
        found = torch.empty(self.size * (self.size + 1) // 2)
        start = 0
        for panel in self._panels:
            part = (panel / (self.count or 1.0))[_upper(panel)]
            found[start : start + len(part)] = part
            start += len(part)
        if not is_finite(found):
            raise UserError(f"{name}: {NOT_FINITE}")
        return found


class Summands:
    """In the place of a `SecondMoment`, what is to be added to one elsewhere: the products of each `add`, float32."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.size, self._device = size, torch.device(device)
        self.counts: list[float] = []
        self.products: list[Tensor] = []

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """As `SecondMoment.add`."""
        count, products = _products(x, weights, self.size, self._device)
        self.counts.append(count)
        self.products += products


def absorb_all(moment: SecondMoment, counts: Sequence[float], products: Iterator[Tensor]) -> None:
    """Add to `moment` what a `Summands` of its size kept; products: read as far as they are its own."""
    panels = len(list(_panels(moment.size)))
    for count in counts:
        moment.absorb(count, islice(products, panels))


def _products(x: Tensor, weights: Tensor | None, size: int, device: torch.device) -> tuple[float, Iterator[Tensor]]:
    """How much the tokens count together, and of each panel its rows of the weighted sum of ``x x^T``, float32."""
    x = x.detach().reshape(-1, size).to(device, torch.float32)
    count = float(x.shape[0])
    if weights is not None:
        weights = weights.detach().reshape(-1).to(device, torch.float32)
        kept = weights != 0
        x, weights = x[kept], weights[kept]
        count = weights.sum(dtype=torch.float64).item()
        x = x * weights.sqrt()[:, None]
    return count, (x[:, rows].T @ x[:, rows.start :] for rows in _panels(size))


def _size(triangle: Tensor) -> int:
    size = int(((8 * len(triangle) + 1) ** 0.5 - 1) / 2)
    if size * (size + 1) // 2 != len(triangle):
        raise ValueError(f"{len(triangle)} numbers are no triangle of a square matrix")
    return size


def diagonal(triangle: Tensor) -> Tensor:
    """The diagonal (n,) of the matrix whose upper half `SecondMoment.triangle` is; ValueError as in `unpacked`."""
    size = _size(triangle)
    rows = torch.arange(size, device=triangle.device)
    return triangle[rows * size - rows * (rows - 1) // 2]


def unpacked(triangle: Tensor) -> Tensor:
    """The symmetric (n, n) float32 of which `triangle` (n (n + 1) / 2,) is the upper half.

    ValueError where no n fits its length.
    """
    size = _size(triangle)
    matrix = torch.empty(size, size)
    # Row by row in NumPy: half the time of a mask, which would be as large as the matrix.
    numbers, place, start = triangle.float().cpu().numpy(), matrix.numpy(), 0
    for row in range(size):
        place[row, row:] = numbers[start : start + size - row]
        start += size - row
    return mirror_(matrix)


def _panels(size: int) -> Iterator[slice]:
    """The rows of each panel of a (size, size): a panel holds its rows from their first diagonal entry on."""
    return panels(size, _ROWS)


def _upper(panel: Tensor) -> Tensor:
    return torch.ones(panel.shape, dtype=torch.bool, device=panel.device).triu()
