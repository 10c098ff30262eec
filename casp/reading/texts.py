"""Texts and rows of data in local files."""

from pathlib import Path
from typing import Any

from casp.errors import UserError
from casp.reading.documents import parse_json
from casp.reading.files import read_text

MOST_BYTES = 64 << 20  # some sixteen million tokens


def read_prose(path: Path) -> str:
    """The text of a .txt file; UserError for one of nothing but white space."""
    text = read_text(path, "the text", MOST_BYTES)
    if not text.strip():
        raise UserError(f"the text {path} holds nothing but white space; give another.")
    return text


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a .jsonl file, each a JSON object, with the number of its line; blank lines are left out."""
    rows = []
    for number, line in enumerate(read_text(path, "the file", MOST_BYTES).split("\n"), start=1):
        if line.strip():
            rows.append((number, parse_json(line, f"line {number} of {path}", "correct or remove it")))
    if not rows:
        raise UserError(f"{path} has no usable rows; give it one JSON object a line.")
    return rows


def string_of(row: dict[str, Any], field: str, source: str, number_too: bool = False) -> str:
    """The text in `field` of a row (number_too: or a whole number); UserError for anything else and for blanks."""
    value = row.get(field)
    if type(value) not in ((str, int) if number_too else (str,)) or not str(value).strip():
        raise UserError(f"{source} has no text in quotes, or a blank one, as {field!r}; correct or remove it.")
    return str(value)
