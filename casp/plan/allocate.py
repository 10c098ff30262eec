"""Choosing one option for every linear within a budget of bytes: five ways, one signature.

Each takes the linears with their options and the bytes that all may take together, and returns path -> option; none
exceeds the budget. UserError where even the smallest options do.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from casp.errors import UserError
from casp.lowrank import rank_for
from casp.plan.options import LinearOptions, Option
from casp.plan.silence import silent_stdout

Allocation = Callable[[Sequence[LinearOptions], int], dict[str, Option]]

PAPER_KEEP_RATIO = 0.25
_GAP = 1e-6  # relative to the optimal cost: what the solver may leave
_SECONDS = 120.0  # a budget of time; the bound is so tight that 600 linears take a second or two


def frontier(options: Sequence[Option]) -> list[Option]:
    """Those of `options` that no other beats in bytes and cost both, in ascending bytes, falling cost."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.cost)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def _hull(options: Sequence[Option]) -> list[Option]:
    """The corners of the lower convex hull of cost over bytes, in ascending bytes."""
    kept: list[Option] = []
    for option in frontier(options):
        while len(kept) > 1 and _gain(kept[-2], option) >= _gain(kept[-2], kept[-1]):
            kept.pop()
        kept.append(option)
    return kept


def _gain(smaller: Option, larger: Option) -> float:
    """What each byte from one option to the other takes off the cost."""
    return (smaller.cost - larger.cost) / (larger.bytes - smaller.bytes)


def least_cost(linears: Sequence[LinearOptions], budget: int) -> float:
    """A total cost below which no plan of these options lies, whatever finds it: the knapsack with options in parts.

    Between the corners of their hulls linears go in the order of what a byte gains (Sinha and Zoltners, Operations
    Research 27, 1979); the last step is taken in part.
    """
    hulls = [_hull(linear.options) for linear in linears]
    check_budget(sum(hull[0].bytes for hull in hulls), budget, sum(linear.weights for linear in linears))
    left, cost = budget - sum(hull[0].bytes for hull in hulls), sum(hull[0].cost for hull in hulls)
    for step in sorted(
        (step for hull in hulls for step in pairwise(hull)), key=lambda step: _gain(*step), reverse=True
    ):
        taken = min(step[1].bytes - step[0].bytes, left)
        left, cost = left - taken, cost - taken * _gain(*step)
    return cost


def check_budget(smallest: int, budget: int, weights: int) -> None:
    """UserError where `smallest`, the fewest bytes possible for so many weights, exceeds `budget`."""
    if smallest > budget:
        raise UserError(
            f"the smallest plan takes {smallest} bytes ({8 * smallest / weights:.3f} bits a weight), more than the "
            f"budget of {budget}; allow more bits."
        )


def knapsack(linears: Sequence[LinearOptions], budget: int) -> dict[str, Option]:
    """The options of least total cost within the budget, exactly: a multiple-choice knapsack as an integer program."""
    choices = [frontier(linear.options) for linear in linears]
    check_budget(sum(options[0].bytes for options in choices), budget, sum(linear.weights for linear in linears))
    flat = [option for options in choices for option in options]
    owner = np.repeat(np.arange(len(choices)), [len(options) for options in choices])
    size = np.array([option.bytes for option in flat], dtype=float)
    cost = np.array([option.cost for option in flat])
    # In units in which the solver's absolute tolerances (1e-6) are far below a byte and below any cost that matters.
    unit = max(cost.max(), np.finfo(float).tiny) / 100
    one_each = LinearConstraint(csr_array((np.ones(len(flat)), (owner, np.arange(len(flat))))), 1, 1)
    within = LinearConstraint(csr_array((size / budget)[None]), -np.inf, 1)
    with silent_stdout():
        found = milp(
            cost / unit,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[one_each, within],
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
    if found.x is None:
        raise UserError(f"no plan was found within {budget} bytes ({found.message}); allow more bits.")
    if found.status:
        print(f"the plan is within the budget, not proven to be the best: {found.message.strip()}", file=sys.stderr)
    picked = {linears[owner[i]].path: flat[i] for i in np.flatnonzero(found.x > 0.5)}
    return _within(picked, choices, linears, budget)


def _within(
    picked: dict[str, Option], choices: list[list[Option]], linears: Sequence[LinearOptions], budget: int
) -> dict[str, Option]:
    """`picked` with the cheapest step down for as long as the solver's tolerance has let it exceed the budget."""
    total = sum(option.bytes for option in picked.values())
    while total > budget:
        steps = [
            (smaller.cost - picked[linear.path].cost, linear.path, smaller)
            for linear, options in zip(linears, choices, strict=True)
            for smaller in options
            if total - picked[linear.path].bytes + smaller.bytes <= budget
        ]
        if not steps:
            raise UserError(f"no plan was found within {budget} bytes; allow more bits.")
        _, path, smaller = min(steps, key=lambda step: step[0])
        total += smaller.bytes - picked[path].bytes
        picked[path] = smaller
    return picked


def uniform(linears: Sequence[LinearOptions], budget: int) -> dict[str, Option]:
    """Every linear at full rank and, as evenly as formats allow, alike.

    All take the richest format that all can afford; the bytes left lift linears to the next one, evenly spread over the
    model: the decision knows nothing of what a linear is for.
    """
    ladders = [_distinct([option for option in linear.options if option.rank is None]) for linear in linears]
    return _spread(linears, ladders, budget)


def _distinct(options: Sequence[Option]) -> list[Option]:
    """One option a size, in ascending bytes."""
    return list({option.bytes: option for option in sorted(options, key=lambda option: option.bytes)}.values())


def _spread(linears: Sequence[LinearOptions], ladders: list[list[Option]], budget: int) -> dict[str, Option]:
    check_budget(sum(ladder[0].bytes for ladder in ladders), budget, sum(linear.weights for linear in linears))
    rung = 0
    while sum(ladder[min(rung + 1, len(ladder) - 1)].bytes for ladder in ladders) <= budget:
        rung += 1
        if rung >= max(map(len, ladders)):
            break
    picked = [ladder[min(rung, len(ladder) - 1)] for ladder in ladders]
    left = budget - sum(option.bytes for option in picked)
    for index in evenly(len(linears)):
        step = ladders[index][min(rung + 1, len(ladders[index]) - 1)]
        if step.bytes - picked[index].bytes <= left:
            left -= step.bytes - picked[index].bytes
            picked[index] = step
    return {linear.path: option for linear, option in zip(linears, picked, strict=True)}


def evenly(count: int) -> list[int]:
    """0 to count - 1 in an order of which every beginning is spread over the whole: multiples of the golden ratio."""
    return sorted(range(count), key=lambda index: (index * (math.sqrt(5) - 1) / 2) % 1)


def closed_form(linears: Sequence[LinearOptions], budget: int) -> dict[str, Option]:
    """The paper's allocation: `b_l = B + 1/2 log2(s_l / G)` bits for a stored weight, rounded to formats.

    s_l is the influence of the linear's block, G their mean, geometric and weighted by sizes, B what the budget
    allows on average; it minimises `sum s_l N_l 2^(-2 b_l)` (Gholami et al., CVPR 2025, section 3.3). Linears that may
    be low-rank keep `PAPER_KEEP_RATIO` of their weights, their factors in formats as alike as can be.
    """
    ladders = [_fixed_ranks(linear) for linear in linears]
    check_budget(sum(ladder[0].bytes for ladder in ladders), budget, sum(linear.weights for linear in linears))
    stored = [_stored_weights(linear, ladder[0].rank) for linear, ladder in zip(linears, ladders, strict=True)]
    shift = [0.5 * math.log2(max(linear.influence, 1e-12)) for linear in linears]
    rates = [[8 * option.bytes / weights for option in ladder] for ladder, weights in zip(ladders, stored, strict=True)]

    def nearest(level: float) -> list[int]:
        return [
            min(range(len(rate)), key=lambda i: abs(rate[i] - (level + extra)))
            for rate, extra in zip(rates, shift, strict=True)
        ]

    def total(picked: list[int]) -> int:
        return sum(ladder[i].bytes for ladder, i in zip(ladders, picked, strict=True))

    # Bytes never fall as the level rises: bisection finds the highest level that the budget allows.
    low, high = min(map(min, rates)) - max(shift) - 1, max(map(max, rates)) - min(shift) + 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if total(nearest(middle)) <= budget else (low, middle)
    picked = nearest(low)
    left = budget - total(picked)
    # What rounding left goes, one format up, to those that it has taken most from.
    lacking = [low + extra - rate[i] for rate, extra, i in zip(rates, shift, picked, strict=True)]
    for index in sorted(range(len(linears)), key=lambda index: -lacking[index]):
        ladder, at = ladders[index], picked[index]
        if at + 1 < len(ladder) and ladder[at + 1].bytes - ladder[at].bytes <= left:
            left -= ladder[at + 1].bytes - ladder[at].bytes
            picked[index] = at + 1
    return {linear.path: ladder[i] for linear, ladder, i in zip(linears, ladders, picked, strict=True)}


def _stored_weights(linear: LinearOptions, rank: int | None) -> int:
    return linear.weights if rank is None else rank * (linear.out_features + linear.in_features)


def _fixed_ranks(linear: LinearOptions) -> list[Option]:
    """The options of the paper's recipe, one a size: the rank that keeps a quarter where low rank is offered."""
    wanted = rank_for(PAPER_KEEP_RATIO, linear.out_features, linear.in_features)
    offered = {option.rank for option in linear.options if option.rank is not None}
    rank = min(offered, key=lambda rank: abs(rank - (wanted or 0))) if offered else None
    options = [option for option in linear.options if option.rank == rank]
    if rank is None:
        return _distinct(options)
    return _distinct([option for option in options if option.formats[0] == option.formats[1]] or options)


def ranks_only(linears: Sequence[LinearOptions], budget: int) -> dict[str, Option]:
    """`uniform`, with the best ranks and formats within the bytes that it gives to those that may be low-rank."""
    even = uniform(linears, budget)
    free = [linear for linear in linears if any(option.rank is not None for option in linear.options)]
    return {**even, **(knapsack(free, sum(even[linear.path].bytes for linear in free)) if free else {})}


def fixed_ranks_only(linears: Sequence[LinearOptions], budget: int) -> dict[str, Option]:
    """`closed_form` with every block of one influence: the paper's ranks, bits for all alike."""
    return closed_form([replace(linear, influence=1.0) for linear in linears], budget)


def least_bytes(allocation: str, linear: LinearOptions) -> int:
    """The fewest bytes that an allocation of this name can leave of a linear."""
    if allocation in ("uniform", "ranks"):
        offered = [option for option in linear.options if option.rank is None]
    elif allocation in ("paper", "paper-ranks"):
        offered = _fixed_ranks(linear)
    else:
        offered = linear.options
    return min(option.bytes for option in offered)


ALLOCATIONS: dict[str, Allocation] = {
    "optimal": knapsack,
    "ranks": ranks_only,
    "paper": closed_form,
    "paper-ranks": fixed_ranks_only,
    "uniform": uniform,
}
"""What --allocation chooses from."""
