"""Sizes as users write them, and the printed plan."""

import pytest

from casp.errors import UserError
from casp.plan.budget import parse_size
from casp.plan.options import LinearOptions, Option
from casp.plan.table import aligned, by_block, by_role


@pytest.mark.parametrize(
    ("text", "size"),
    [("30MB", 30_000_000), ("1.5 GB", 1_500_000_000), ("700MiB", 700 * 2**20), ("123456", 123456), (".5kb", 500)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "3 parsecs", "0", "1e9"])
def test_no_sizes(text):
    with pytest.raises(UserError, match="is no size"):
        parse_size(text)


def test_tables_sum_what_the_plan_holds():
    linears, plan = [], {}
    for block in range(2):
        for role, option in (
            ("q", Option(5, ({"bits": 4}, {"bits": 3}), 100, 0.25)),
            ("v", Option(None, ({"bits": 2},), 200, 0.5)),
        ):
            linear = LinearOptions(f"b.{block}.{role}", block, role, 20, 40, 0.1, (option,))
            linears.append(linear)
            plan[linear.path] = option
    roles = by_role(plan, linears)
    assert roles[1:] == [
        ["q", "2", "2", "5", "1.00", "33.3%", "0.5000"],
        ["v", "2", "0", "", "2.00", "66.7%", "1.0000"],
    ]
    blocks = by_block(plan, linears)
    assert blocks == [["block", "q", "v", "predicted"]] + [[str(b), "r5 1.00", "2.00", "0.7500"] for b in range(2)]
    assert len({len(line) for line in aligned(blocks).splitlines()}) == 1
