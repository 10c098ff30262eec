"""The experiment behind the default whitening runs and tells the candidates apart."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "SVD" / "experiments" / "whitening.py"


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen3"])
def test_one_line_for_each_candidate(name, request, capsys):
    module = runpy.run_path(str(SCRIPT))
    flags = ["--device", "cpu", "--samples", "2", "--sequence-length", "32", "--batch-size", "2", "--windows", "1"]
    module["main"](["--model", str(request.getfixturevalue(name)), "--dataset", "demo", *flags])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["candidate"] for row in rows] == list(module["CANDIDATES"])
    assert all(row["divergence"] > 0 for row in rows)
    assert len({row["divergence"] for row in rows}) == len(rows)
