"""What can be said of a plan before anything is priced: that its words leave formats, and the fewest bytes."""

import functools

from casp.backend import load_backend
from casp.errors import UserError
from casp.linear import LowRankLinear, QuantizedLinear
from casp.lowrank import LOW_RANK_ROLES
from casp.model.decoder import Decoder
from casp.plan.allocate import check_budget, least_bytes
from casp.plan.file import shapes
from casp.plan.flags import Goal, Prices, wanted_entries
from casp.plan.options import LinearOptions, chosen_formats, layouts


def refuse_compressed(decoder: Decoder) -> None:
    """UserError for a model whose linears are low-rank or quantized already: a plan decides on both."""
    if decoder.holds(LowRankLinear) or decoder.holds(QuantizedLinear):
        raise UserError(
            f"{decoder.folder} is compressed already; a plan chooses ranks and formats together: give the original."
        )


def check_least(goal: Goal, prices: Prices, decoder: Decoder, budget: int) -> None:
    """UserError where no plan can be: --format is not in the backend's words or leaves a linear without a format, or
    the smallest options of all linears take more than the budget, whatever they will cost.
    """
    refuse_compressed(decoder)
    backend, wanted, sizes = load_backend(prices.backend), wanted_entries(prices.format), shapes(decoder)
    for path, shape in sizes.items():
        if not chosen_formats(backend, *shape, prices.tuned, wanted):
            raise UserError(f"--format {' '.join(prices.format)} leaves no format for {path}; ask for less.")

    @functools.cache
    def least(shape: tuple[int, int], low_rank: bool) -> int:
        options = tuple(layouts(backend, *shape, low_rank, prices.tuned, wanted))
        return least_bytes(goal.allocation, LinearOptions("", 0, "", *shape, 0.0, options))

    smallest = sum(
        least(sizes[f"{block}.{path}"], goal.low_rank and role in LOW_RANK_ROLES)
        for index, block in enumerate(decoder.blocks)
        for role, path in decoder.linears(index).items()
    )
    check_budget(smallest, budget, decoder.original_weights())
