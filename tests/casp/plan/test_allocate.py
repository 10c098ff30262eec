"""Allocations against brute force, against the formula of the paper, and against their promises."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from casp.errors import UserError
from casp.plan.allocate import ALLOCATIONS, closed_form, evenly, knapsack, least_cost, uniform
from casp.plan.options import LinearOptions, Option


def linear(number, options, influence=0.5, shape=(8, 8)):
    return LinearOptions(f"block.{number}.q", number, "q", *shape, influence, tuple(options))


costs = st.floats(1e-6, 1.0, allow_nan=False)
one_option = st.builds(lambda size, cost: Option(None, ({"bits": size},), size, cost), st.integers(1, 40), costs)
problems = st.lists(st.lists(one_option, min_size=1, max_size=4), min_size=1, max_size=5)


def spent(plan):
    return sum(option.bytes for option in plan.values())


def paid(plan):
    return sum(option.cost for option in plan.values())


@settings(max_examples=80, deadline=None)
@given(problem=problems, extra=st.integers(0, 80))
def test_knapsack_is_the_best_of_all_plans(problem, extra):
    linears = [linear(number, options) for number, options in enumerate(problem)]
    budget = sum(min(option.bytes for option in options) for options in problem) + extra
    best = min(
        sum(option.cost for option in plan)
        for plan in itertools.product(*problem)
        if sum(option.bytes for option in plan) <= budget
    )
    found = knapsack(linears, budget)
    assert set(found) == {each.path for each in linears}
    assert spent(found) <= budget
    assert paid(found) == pytest.approx(best, rel=1e-5, abs=1e-9)


@settings(max_examples=80, deadline=None)
@given(problem=problems, extra=st.integers(0, 80))
def test_least_cost_is_the_linear_programs_and_no_plan_is_below_it(problem, extra):
    linears = [linear(number, options) for number, options in enumerate(problem)]
    budget = sum(min(option.bytes for option in options) for options in problem) + extra
    flat = [option for options in problem for option in options]
    owners = [number for number, options in enumerate(problem) for _ in options]
    relaxed = linprog(
        [option.cost for option in flat],
        A_ub=[[option.bytes for option in flat]],
        b_ub=[budget],
        A_eq=[[float(owner == number) for owner in owners] for number in range(len(problem))],
        b_eq=[1.0] * len(problem),
    )
    found = least_cost(linears, budget)
    assert found == pytest.approx(relaxed.fun, rel=1e-6, abs=1e-9)
    assert found <= paid(knapsack(linears, budget)) * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(problem=problems, extra=st.integers(0, 60), more=st.integers(1, 40))
def test_more_budget_never_costs_more(problem, extra, more):
    linears = [linear(number, options) for number, options in enumerate(problem)]
    budget = sum(min(option.bytes for option in options) for options in problem) + extra
    assert paid(knapsack(linears, budget + more)) <= paid(knapsack(linears, budget)) * (1 + 1e-5) + 1e-9


def ladder(weights, rates, influence=1.0, rank=None):
    """Options at `rates` bits a stored weight, costs after the paper's model."""
    formats = 1 if rank is None else 2
    return [
        Option(rank, ({"bits": rate},) * formats, round(weights * rate / 8), influence * weights * 4.0**-rate)
        for rate in rates
    ]


def model_like(influences, rates, weights=80_000):
    return [
        LinearOptions(f"b.{i}", i, "v", 200, weights // 200, s, tuple(ladder(weights, rates, s)))
        for i, s in enumerate(influences)
    ]


FINE = [rate / 16 for rate in range(8, 16 * 6)]
spreads = st.lists(st.floats(0.02, 0.95), min_size=8, max_size=12)


@settings(max_examples=8, deadline=None)
@given(influences=spreads, bits=st.floats(2.5, 3.5))
def test_closed_form_is_the_papers_formula_where_formats_are_fine(influences, bits):
    linears = model_like(influences, FINE)
    budget = int(bits * sum(each.weights for each in linears) / 8)
    mean = sum(map(math.log2, influences)) / len(influences)
    for allocation in (closed_form, knapsack):  # the costs follow the paper's model, so both have one optimum
        found = allocation(linears, budget)
        assert 0.995 * budget <= spent(found) <= budget
        for each in linears:
            wanted = bits + 0.5 * (math.log2(each.influence) - mean)
            assert 8 * found[each.path].bytes / each.weights == pytest.approx(wanted, abs=0.08)


@settings(max_examples=8, deadline=None)
@given(influences=st.lists(st.floats(0.02, 0.95), min_size=60, max_size=80), bits=st.floats(1.1, 3.9))
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_budget_is_met_and_never_exceeded(name, influences, bits):
    linears = model_like(influences, [1, 2, 3, 4])
    budget = int(bits * sum(each.weights for each in linears) / 8)
    found = ALLOCATIONS[name](linears, budget)
    assert spent(found) <= budget
    one_step = linears[0].weights / 8
    assert spent(found) >= budget - max(0.005 * budget, one_step)


def test_closed_form_keeps_a_quarter_with_factors_like_the_rest():
    weights = 200 * 400
    low = [
        option for rank in (17, 33, 66) for option in ladder(rank * 600, [1, 2, 3, 4], rank=rank)
    ]  # a quarter of 200 x 400 is rank 33
    q = LinearOptions("b.0.q", 0, "q", 200, 400, 0.1, (*ladder(weights, [1, 2, 3, 4]), *low))
    rest = [LinearOptions(f"b.{i}.v", i, "v", 200, 400, 0.1, tuple(ladder(weights, [1, 2, 3, 4]))) for i in range(3)]
    found = closed_form([q, *rest], budget=int(2.05 * (3 * weights + 33 * 600) / 8))
    assert found["b.0.q"].rank == 33
    assert found["b.0.q"].formats == ({"bits": 2},) * 2
    assert all(option.formats == ({"bits": 2},) for path, option in found.items() if path != "b.0.q")


def test_uniform_is_one_format_where_the_budget_is_that_of_one():
    linears = model_like([0.9, 0.1, 0.5], [1, 2, 3])
    found = uniform(linears, int(2.2 * linears[0].weights / 8) * 3)
    assert {option.formats[0]["bits"] for option in found.values()} == {2}
    richer = uniform(linears, 10**9)
    assert {option.formats[0]["bits"] for option in richer.values()} == {3}


@given(count=st.integers(20, 200), share=st.floats(0.2, 0.8))
def test_evenly_spreads_every_beginning(count, share):
    first = evenly(count)[: int(share * count)]
    assert sorted(evenly(count)) == list(range(count))
    half = sum(index < count / 2 for index in first)
    assert abs(half - len(first) / 2) <= 2 + 0.02 * count


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_budget_below_the_smallest_plan_is_refused(name):
    with pytest.raises(UserError, match="allow more bits"):
        ALLOCATIONS[name](model_like([0.5, 0.5], [2, 3]), 1000)
