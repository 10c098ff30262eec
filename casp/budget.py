"""Exact bytes of a plan, and which linears get more bits when bytes are free.

A plan maps the path of every matrix that is stored (a linear, or a factor of a low-rank one) to its format.
"""

from collections.abc import Mapping, Sequence

from casp.backend import Backend, Format
from casp.errors import UserError
from casp.model.decoder import Decoder

Plan = dict[str, Format]


def matrices(decoder: Decoder) -> dict[str, tuple[int, int, int]]:
    """Path of every stored matrix of the decoder's linears -> (block, out_features, in_features)."""
    found = {}
    for index, block in enumerate(decoder.blocks):
        for path in decoder.linears(index, factors=True).values():
            linear = decoder.block(index).get_submodule(path)
            found[f"{block}.{path}"] = (index, linear.out_features, linear.in_features)
    return found


def uniform_plan(decoder: Decoder, format: Format) -> Plan:
    """Every matrix in one format."""
    return {path: format for path in matrices(decoder)}


def plan_bytes(plan: Plan, shapes: Mapping[str, tuple[int, int, int]], backend: Backend) -> int:
    """Exact bytes of all matrices under `plan`."""
    return sum(backend.bytes(format, *shapes[path][1:]) for path, format in plan.items())


def original_bytes(decoder: Decoder, backend: Backend, format: Format) -> int:
    """Exact bytes that the original model's linears would take, all in `format` and none of them low-rank."""
    total = 0
    for index in range(len(decoder.blocks)):
        for path in decoder.linears(index).values():
            linear = decoder.block(index).get_submodule(path)
            total += backend.bytes(format, linear.out_features, linear.in_features)
    return total


def promote(
    plan: Plan,
    shapes: Mapping[str, tuple[int, int, int]],
    backend: Backend,
    ladder: Sequence[Format],
    block_influence: Sequence[float],
    budget: int,
) -> Plan:
    """Spend `budget` bytes: more bits for the blocks of highest block influence, never more bytes than given.

    ladder: formats from the plan's own upwards. Rung by rung, whole blocks in the order of their influence
    move up while they fit; what is left then lifts single matrices in the same order (largest first), so
    that little stays unspent. UserError when the plan alone exceeds the budget.
    """
    plan = dict(plan)
    left = budget - plan_bytes(plan, shapes, backend)
    if left < 0:
        raise UserError(
            f"the smallest format of this plan takes {budget - left} bytes, more than the budget of {budget}; "
            "allow more bits."
        )
    order = sorted(range(len(block_influence)), key=lambda index: -block_influence[index])
    members = {index: [path for path in plan if shapes[path][0] == index] for index in order}

    def extra(path: str, format: Format) -> int:
        shape = shapes[path][1:]
        return backend.bytes(format, *shape) - backend.bytes(plan[path], *shape)

    for rung in ladder[1:]:
        waiting = []
        for index in order:
            cost = sum(extra(path, rung) for path in members[index])
            if not waiting and cost <= left:
                plan.update(dict.fromkeys(members[index], rung))
                left -= cost
            else:
                waiting.append(index)
        if not waiting:
            continue
        for index in waiting:
            for path in sorted(members[index], key=lambda path: -extra(path, rung)):
                if extra(path, rung) <= left:
                    left -= extra(path, rung)
                    plan[path] = rung
        break
    return plan
