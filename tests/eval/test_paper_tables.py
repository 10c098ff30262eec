"""Rows of the paper's tables: all their commands are understood, and --dry-run resolves them without the hub."""

import importlib
import importlib.util
import itertools

import pytest
from casp_eval import paper_tables
from casp_eval.paper_tables import ROWS, STORED_NAMES, TASKS, commands, main

from casp.errors import UserError


@pytest.fixture
def understood(monkeypatch):
    """Whether a command gets past its parser: the model that it names is asked for, or other UserErrors come."""

    class Parsed(Exception):
        """The flags were understood."""

    def parse(self, arguments=None, namespace=None):
        original(self, arguments, namespace)
        raise Parsed

    from casp.cli import Parser

    original = Parser.parse_args
    monkeypatch.setattr(Parser, "parse_args", parse)

    def run(words):
        name = words[0]
        package = importlib.util.find_spec(name).submodule_search_locations is not None
        with pytest.raises(Parsed):
            importlib.import_module(f"{name}.__main__" if package else name).main(words[1:])

    return run


def test_every_command_of_every_row_is_understood(understood, tmp_path):
    seen = set()
    for row in ROWS.values():
        for words in commands(row, tmp_path, ["--device", "cpu"], ["--dataset", "demo"], 5):
            kind = (words[0], *(word for word in words if word.startswith("--")))
            if kind not in seen:
                understood(words)
            seen.add(kind)
    assert {kind[0] for kind in seen} == {
        *("casp_svd", "casp_gptq", "casp_quip_sharp", "casp_aqlm", "casp_eval.perplexity", "casp_eval.lmms_eval"),
    }


def test_a_row_goes_on_from_what_its_own_commands_wrote(tmp_path):
    for row in ROWS.values():
        written = []
        for words in commands(row, tmp_path, [], [], None):
            flags = dict(itertools.pairwise(words))
            assert flags["--model"] in ([row_hub(row), *written])
            assert flags["--output"] not in written
            written.append(flags["--output"])
        assert len(written) == (row.table == "text") + 1 + (row.backend is not None) + row.method.startswith("casp-")


def row_hub(row):
    return paper_tables.REAL[row.model].hub


WEIGHTS, OUTPUTS, MATRICES = 6_476_005_376, 32 * (5 * 4096 + 2 * 11008), 32 * 7  # of a 7B Llama's blocks


@pytest.mark.parametrize(
    ("row", "size"),
    [
        # a code of 2 bits; a zero of 2 and a scale of 16 bits for 128 weights
        ("images/LLaVA-1.5-7B/casp-gptq", WEIGHTS * 2 // 8 + WEIGHTS // 128 * 18 // 8),
        # the same bits for codes; a scale a row; two codebooks of 256 vectors of 8 a matrix; floats of 16 bits
        ("text/Llama-2-7B/aqlm", WEIGHTS * 2 // 8 + 2 * OUTPUTS + 2 * 256 * 8 * 2 * MATRICES),
    ],
)
def test_dry_run(row, size, capsys, monkeypatch):
    monkeypatch.setattr(paper_tables, "known_tasks", lambda: set(STORED_NAMES.read_text().splitlines()[1:]))
    main(["--row", row, "--dry-run"])
    out = capsys.readouterr().out
    assert "6,476,005,376 weights in 32 blocks" in out
    assert f": {size:,} bytes" in out
    assert f"== {row}" in out
    monkeypatch.setattr(paper_tables, "known_tasks", set)
    if "text" not in row:
        with pytest.raises(UserError, match="'coco2017_cap_val' is unknown"):
            main(["--row", row, "--dry-run"])


@pytest.mark.slow
def test_dry_run_of_every_row(capsys):
    main(["--dry-run"])
    out = capsys.readouterr().out
    assert all(f"== {name}\n" in out for name in ROWS)


def test_bad_input(refused):
    assert "--row any is unknown" in refused(main, "--row", "any")


@pytest.mark.skipif(not importlib.util.find_spec("lmms_eval"), reason="needs the extra lmms-eval")
def test_the_stored_names_hold_every_benchmark_that_the_harness_knows():
    stored = set(STORED_NAMES.read_text().splitlines()[1:])
    wanted = {task for tasks in TASKS.values() for task in tasks}
    assert wanted <= stored & paper_tables.known_tasks()
