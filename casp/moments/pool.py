"""Second moments of experts that saw few tokens, topped up by what their layer's experts saw together."""

import logging
from collections.abc import Mapping

from casp.model.split import pool_of
from casp.moments.second_moment import SecondMoment

log = logging.getLogger(__name__)


def top_up(moments: Mapping[str, SecondMoment], name: str) -> None:
    """Give each expert's moment as many tokens as it has columns, where fewer were routed to it, in place.

    moments: of linears' inputs or outputs, by path; name: of the block, for the warning. What is missing comes from the
    mean over all experts of the layer at the same place: with no token of its own an expert gets that mean alone.
    """
    pools: dict[str, list[SecondMoment]] = {}
    for path, moment in moments.items():
        pool = pool_of(path)
        if pool is not None:
            pools.setdefault(pool, []).append(moment)
    for pool, members in pools.items():
        poor = [moment for moment in members if moment.count < moment.size]
        if not poor:
            continue
        together = SecondMoment.total(members)
        for moment in poor:
            moment.borrow(together, moment.size - moment.count)
        log.warning(
            "%s, %s: %d of %d experts saw fewer tokens than they have columns; topped up by what all of them saw",
            name,
            pool,
            len(poor),
            len(members),
        )
