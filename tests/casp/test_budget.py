"""Plans: exact bytes, and promotion by block influence within the budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casp.budget import matrices, original_bytes, plan_bytes, promote, uniform_plan
from casp.errors import UserError
from casp.model.decoder import Decoder

LADDER = [{"bits": 2}, {"bits": 3}, {"bits": 4}]


class Counting:
    """A backend of which only the bytes matter: bits per weight and 2 bytes a row."""

    def bytes(self, format, out_features, in_features):
        return out_features * in_features * format["bits"] // 8 + 2 * out_features


def shapes_of(widths):
    return {f"{block}.{i}": (block, 8 * w, 64) for block, row in enumerate(widths) for i, w in enumerate(row)}


widths = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=7), min_size=1, max_size=8)


@given(widths, st.floats(0, 1), st.randoms(use_true_random=False))
def test_never_over_budget_and_little_unspent(widths, share, random):
    shapes, backend = shapes_of(widths), Counting()
    plan = dict.fromkeys(shapes, LADDER[0])
    low = plan_bytes(plan, shapes, backend)
    high = plan_bytes(dict.fromkeys(shapes, LADDER[-1]), shapes, backend)
    budget = low + int(share * (high - low))
    influence = [random.random() for _ in widths]
    result = promote(plan, shapes, backend, LADDER, influence, budget)
    spent = plan_bytes(result, shapes, backend)
    assert spent <= budget
    smallest_step = max(
        backend.bytes(LADDER[2], *shape[1:]) - backend.bytes(LADDER[1], *shape[1:]) for shape in shapes.values()
    )
    assert spent == high or budget - spent < smallest_step


@given(widths, st.randoms(use_true_random=False))
def test_the_most_influential_block_rises_first(widths, random):
    shapes, backend = shapes_of(widths), Counting()
    plan = dict.fromkeys(shapes, LADDER[0])
    influence = [random.random() for _ in widths]
    top = max(range(len(widths)), key=lambda index: influence[index])
    paths = [path for path in shapes if shapes[path][0] == top]
    budget = plan_bytes(plan | dict.fromkeys(paths, LADDER[1]), shapes, backend)
    result = promote(plan, shapes, backend, LADDER, influence, budget)
    assert {path for path, format in result.items() if format["bits"] > 2} == set(paths)


def test_a_budget_below_the_smallest_plan_is_refused():
    shapes = shapes_of([[1, 2]])
    with pytest.raises(UserError, match="allow more bits"):
        promote(dict.fromkeys(shapes, LADDER[0]), shapes, Counting(), LADDER, [1.0], 10)


def test_bytes_of_a_decoder(tiny_llama):
    decoder = Decoder(tiny_llama)
    shapes, backend = matrices(decoder), Counting()
    weights = 3 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 96 * 64)
    rows = 3 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert plan_bytes(uniform_plan(decoder, {"bits": 4}), shapes, backend) == weights // 2 + 2 * rows
    assert original_bytes(decoder, backend, {"bits": 4}) == weights // 2 + 2 * rows
