"""The pages of promises and of clients name tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "promises.md").read_text()
NAMED = re.compile(r"`(?P<file>(?:[\w/]+/)?test_\w+\.py)?(?:::)?(?P<test>test_\w+)?`")


def names_in(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


FILES = {str(path.relative_to(ROOT)): names_in(path) for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize(("page", "least"), [("promises.md", 30), ("clients.md", 18)])
def test_every_test_that_is_named_exists(page: str, least: int):
    missing, named = [], 0
    for line in (ROOT / "docs" / page).read_text().splitlines():
        known: set[str] = set().union(*FILES.values())  # until the line names a file
        for match in NAMED.finditer(line):
            file, test = match["file"], match["test"]
            if file:
                found = [names for path, names in FILES.items() if f"/{path}".endswith(f"/{file}")]
                missing += [] if found else [file]
                known = set().union(*found)
            named += bool(test)
            missing += [f"{file or ''}::{test}"] if test and test not in known else []
    assert not missing
    assert named >= least


@pytest.mark.parametrize(
    ("page", "heading", "least"), [("promises.md", "| promise", 25), ("clients.md", "| tried", 22)]
)
def test_every_line_of_a_table_names_a_test_or_a_class_of_cases(page: str, heading: str, least: int):
    """Its last column does, in every table that has one for this."""
    rows, inside = [], False
    for line in (ROOT / "docs" / page).read_text().splitlines():
        if line.startswith(heading):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|---"):
            rows.append(line)
    assert len(rows) >= least
    assert not [row for row in rows if not re.search(r"test_\w+|the same tests", row.rstrip("|").rpartition("|")[2])]


def test_the_classes_of_cases_exist():
    tables = "".join(file.read_text() for file in (ROOT / "tests/hostile").glob("*cases.py"))
    named = set(re.findall(r"(?:class|classes|and) `(\w+)`", PAGE))
    assert len(named) >= 10
    assert not [name for name in named if f'"{name}"' not in tables]
