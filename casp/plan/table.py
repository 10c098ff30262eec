"""A plan in words: one row a role, one row a block, bits from bytes."""

from collections import Counter
from collections.abc import Mapping, Sequence

from casp.plan.file import Plan
from casp.plan.options import LinearOptions, Option


def bits(option: Option, linear: LinearOptions) -> float:
    """Bits per original weight of the linear."""
    return 8 * option.bytes / linear.weights


def cell(option: Option, linear: LinearOptions) -> str:
    """`2.0` for full rank at 2 bits a weight, `r108 1.2` for a rank, bits always of the original weight."""
    rank = "" if option.rank is None else f"r{option.rank} "
    return f"{rank}{bits(option, linear):.2f}"


def by_role(plan: Mapping[str, Option], linears: Sequence[LinearOptions]) -> list[list[str]]:
    """Rows (role, linears, low-rank among them, mean rank, bits, share of bytes, predicted nats), a header first."""
    rows = [["role", "linears", "low rank", "mean rank", "bits", "bytes", "predicted"]]
    total = sum(option.bytes for option in plan.values())
    for role in dict.fromkeys(linear.role for linear in linears):
        members = [(linear, plan[linear.path]) for linear in linears if linear.role == role]
        ranks = [option.rank for _, option in members if option.rank is not None]
        size = sum(option.bytes for _, option in members)
        rate = 8 * size / sum(linear.weights for linear, _ in members)
        mean = f"{sum(ranks) / len(ranks):.0f}" if ranks else ""
        cost = sum(option.cost for _, option in members)
        rows.append(
            [role, str(len(members)), str(len(ranks)), mean, f"{rate:.2f}", f"{size / total:.1%}", f"{cost:.4f}"]
        )
    return rows


def by_block(plan: Mapping[str, Option], linears: Sequence[LinearOptions]) -> list[list[str]]:
    """Rows (block, one cell a role, predicted nats), a header first."""
    roles = list(dict.fromkeys(linear.role for linear in linears))
    rows = [["block", *roles, "predicted"]]
    for block in sorted({linear.block for linear in linears}):
        members = {linear.role: linear for linear in linears if linear.block == block}
        cells = [cell(plan[members[role].path], members[role]) if role in members else "" for role in roles]
        cost = sum(plan[linear.path].cost for linear in members.values())
        rows.append([str(block), *cells, f"{cost:.4f}"])
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows as text in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows)


def describe(plan: Plan, linears: Sequence[LinearOptions], at_least: float) -> str:
    """What is printed before the long work: both tables and the sum, beside the cost `at_least` of any plan."""
    ranks = Counter(option.rank is not None for option in plan.linears.values())
    return "\n\n".join(
        [
            aligned(by_block(plan.linears, linears)),
            aligned(by_role(plan.linears, linears)),
            f"{plan.bits:.4f} bits a weight, {plan.bytes / 1e6:.2f} MB of linears, {ranks[True]} of "
            f"{len(plan.linears)} low-rank, predicted {plan.predicted:.4f} nats a token; no plan of these options is "
            f"below {at_least:.4f}",
        ]
    )
