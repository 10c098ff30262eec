"""docs/architecture.md leads a reader through the code: every file and name that it refers to exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REFERENCES = sorted(
    set(re.findall(r"`([\w/-]+\.py)(?::([\w.]+))?`", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")))
)


def defined(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Functions, classes and their methods, as `Class.method`."""
    names = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                names |= defined(node.body, f"{prefix}{node.name}.")
    return names


@pytest.mark.parametrize(("file", "name"), REFERENCES)
def test_every_reference_exists(file: str, name: str):
    found = ROOT / file if "/" in file else ROOT / "casp" / "cli" / file
    assert found.is_file()
    assert not name or name in defined(ast.parse(found.read_text(encoding="utf-8")).body)


def test_the_drawn_layout_is_the_folders_there_are():
    drawn = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    rooms = {path.name + "/" for path in (ROOT / "casp").iterdir() if (path / "__init__.py").exists()} - {"demo/"}
    assert all(re.search(rf"^  .*\b{re.escape(room)}", drawn, re.M) for room in rooms)
    room, strange = "", []
    for line in drawn.splitlines():
        first = re.match(r"  (\S+)", line)
        room = (first[1] if first[1].endswith("/") else "") if first and line[2] != " " else room
        named = re.findall(r"\b(\w+\.py)\b", line)
        strange += [name for name in named if not (ROOT / "casp" / room / name).exists()]
    assert not strange
