"""Means, intervals and pairs of the comparison of CASP with its baselines, on made-up rows."""

import json

import pytest
from casp_eval.versus_report import interval, saved, table, write_report


def row(allocation, seed, excess, bits=2.05):
    return {
        "model": "demo-llama",
        "backend": "quip-sharp",
        "codebook": "e8p",
        "casp": allocation != "uniform",
        "allocation": allocation,
        "tuned": False,
        "bits": bits,
        "bpw": bits - 0.01,
        "seed": seed,
        "excess_text": excess,
        "excess_other_text": 2 * excess,
        "answer_perplexity": None,
        "accuracy": None,
        "accuracy_unseen": None,
    }


ROWS = [row("uniform", seed, 0.8 + 0.1 * seed) for seed in range(3)] + [
    row("optimal", seed, 0.6 + 0.1 * seed) for seed in range(3)
]


def test_interval_is_students():
    # Three values 1, 2, 3: standard error 1 / sqrt(3), t(0.975, 2) = 4.302653 (tables).
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2)
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert interval([5.0]) == (5.0, 0.0)


def test_saved_compares_pairs_of_one_seed():
    assert saved(ROWS) == pytest.approx([0.25, 1 - 0.7 / 0.9, 0.2])
    assert saved(ROWS[:3]) == []


def test_report_holds_all_rows_and_says_what_is_saved(tmp_path):
    write_report(tmp_path, ROWS)
    assert json.loads((tmp_path / "report.json").read_text()) == ROWS
    text = (tmp_path / "report.md").read_text()
    assert table(ROWS) in text
    assert "0.900 ± 0.248" in text  # 0.8, 0.9, 1.0: standard error 0.0577, times 4.303
    # 25.0, 22.2 and 20.0%: mean 22.4%, standard deviation 2.506, over the root of 3, times 4.303.
    assert "demo-llama on text that CASP takes away, pairs: 3, mean 22.4% ± 6.2% (95%), least 20.0%" in text
    assert (tmp_path / "demo-llama.png").stat().st_size > 1000


def test_what_is_saved_is_told_by_budget(tmp_path):
    """Seeds of one budget make its interval; a pair of another budget stands by itself."""
    other = [{**row, "bits": 3.0} for row in ROWS if row["seed"] == 0]
    write_report(tmp_path, [*ROWS, *other])
    lines = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("- ")]
    assert len(lines) == 2
    assert lines[0].endswith("pairs: 3, mean 22.4% ± 6.2% (95%), least 20.0%")
    assert ", 3 bits: pairs: 1, mean 25.0%" in lines[1]
