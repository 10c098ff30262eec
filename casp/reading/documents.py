"""JSON of bounded size, depth and memory, of the kind that is expected.

A few bytes of JSON take much more memory as Python's objects ("[]," becomes 64 bytes), and deep nesting ends in a
RecursionError here or in whoever walks the value next; both are bounded before they cost anything.
"""

import json
from pathlib import Path
from typing import Any

from casp.errors import UserError
from casp.reading.files import read_bytes

MOST_BYTES = 64 << 20  # tokenizer.json of the largest vocabularies takes half
MOST_VALUES = 5_000_000
MOST_DEPTH = 64
_KINDS = {dict: "a JSON object", list: "a JSON list"}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def parse_json(data: bytes | str, source: str, remedy: str, kind: type = dict, unique: bool = False) -> Any:
    """The JSON value in `data`, a `kind` (dict or list); UserError "`source` ...; `remedy`." for anything else.

    unique: also refuse an object that names a member twice.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MOST_VALUES:
        raise UserError(f"{source} holds more than {MOST_VALUES} values; {remedy}.")
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique if unique else None)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{source} is not valid JSON ({reason[:100]}); {remedy}.") from error
    if not isinstance(value, kind):
        raise UserError(f"{source} does not hold {_KINDS[kind]}; {remedy}.")
    if _depth_exceeds(value, MOST_DEPTH):
        raise UserError(f"{source} is nested more than {MOST_DEPTH} deep; {remedy}.")
    return value


def read_json(
    path: Path, what: str, kind: type = dict, remedy: str = "download or write it again", most: int = MOST_BYTES
) -> Any:
    """The JSON value in a regular file of at most `most` bytes, a `kind` (dict or list)."""
    return parse_json(read_bytes(path, what, most), f"{what} {path}", remedy, kind)
