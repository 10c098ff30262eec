"""What the comparison of CASP with its baselines keeps, reuses and removes."""

import json
from dataclasses import asdict, replace

import pytest
from casp_eval.casp_vs_baseline import (
    COLUMNS,
    Grid,
    Making,
    Setting,
    Workshop,
    check_alike,
    kept_row,
    kept_rows,
    main,
    of_rows,
    of_work,
    settings,
)
from casp_eval.options import Scoring

from casp.errors import UserError

SETTING = Setting("demo-llama", "gptq", None, "uniform", False, 2.5, 0)


def test_a_folder_of_others_is_neither_measured_nor_removed(tmp_path):
    folder = tmp_path / SETTING.name()
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    workshop = Workshop(tmp_path, Making("auto", 0, 2, 2))
    with pytest.raises(UserError, match="holds other files"):
        workshop.checkpoint(SETTING)
    assert (folder / "notes.txt").read_text() == "mine"


ROW = {**dict.fromkeys(COLUMNS), **asdict(SETTING), "bpw": 2.49, "excess_text": 0.5}


def test_a_row_is_read_again(tmp_path):
    file = tmp_path / "row.json"
    file.write_text(json.dumps(ROW))
    assert kept_row(file, SETTING) == ROW


def test_the_report_is_over_all_rows_that_were_measured(tmp_path):
    others = [ROW, ROW | {"seed": 3}, ROW | {"model": "demo-llava"}]
    for row in others:
        setting = Setting(*(row[name] for name in asdict(SETTING)))
        (tmp_path / f"{setting.name()}.json").write_text(json.dumps(row))
    (tmp_path / "shared.json").write_text("{}")
    assert kept_rows(tmp_path) == others
    (tmp_path / "mine-seed0.json").write_text(json.dumps(ROW))
    with pytest.raises(UserError, match="no row of that name"):
        kept_rows(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("{}", "[]", ""),
        json.dumps(dict.fromkeys(COLUMNS - {"bpw"})),
        *(json.dumps(ROW | {key: value}) for key in ("bpw", "accuracy") for value in ("x", [], True, float("nan"))),
        json.dumps(ROW | {"bpw": None}),
        json.dumps(ROW | {"seed": 1}),
        json.dumps(ROW | {"backend": "aqlm"}),
    ],
)
def test_what_is_no_row_is_told(tmp_path, text):
    file = tmp_path / "row.json"
    file.write_text(text)
    with pytest.raises(UserError, match="measure it again"):
        kept_row(file, SETTING)


def test_the_report_goes_into_no_model_and_over_no_other_files(tmp_path, tiny_llama):
    (tmp_path / "report.md").write_text("# Thesis")
    for output, words in ((tiny_llama, "of a model"), (tmp_path, "exists"), (tiny_llama / "config.json/out", "cannot")):
        with pytest.raises(UserError, match=words):
            main(["--output", str(output), "--work", str(tmp_path / "work")])
    assert (tmp_path / "report.md").read_text() == "# Thesis"


def test_rows_that_were_measured_otherwise_do_not_share_a_table(tmp_path):
    making, scoring = Making("cpu", 0, 2, 2), Scoring("cpu", "auto", 64, 512, 8, 4)
    file = tmp_path / "shared.json"
    check_alike(file, of_rows(making, scoring, 600), "--output")
    check_alike(file, of_rows(replace(making, device="cuda"), replace(scoring, batch_size=2), 600), "--output")
    for wrong, words in (
        ((replace(making, samples=8), scoring, 600), "samples 0, not 8"),
        ((making, replace(scoring, windows=16), 600), "windows 64, not 16"),
        ((making, scoring, 120), "questions 600, not 120"),
    ):
        with pytest.raises(UserError, match=words):
            check_alike(file, of_rows(*wrong), "--output")


def test_moments_of_other_samples_are_not_used_again(tmp_path):
    """--work outlives --output, and its files are known by model, seed and setting alone."""
    file = tmp_path / "shared.json"
    check_alike(file, of_work(Making("cpu", 0, 2, 2)), "--work")
    for other, words in ((Making("cpu", 8, 2, 2), "samples 0, not 8"), (Making("cpu", 0, 2, 3), "epochs 2, not 3")):
        with pytest.raises(UserError, match=f"{words}.*another --work"):
            check_alike(file, of_work(other), "--work")


@pytest.mark.parametrize(("chosen", "expected"), [((), {"e8p", "trellis", None}), (("trellis",), {"trellis", None})])
def test_codebooks_narrow_the_rows(chosen, expected):
    grid = Grid(("demo-llama",), ("gptq", "quip-sharp"), (2.5,), (0,), True, True, chosen)
    assert {setting.codebook for setting in settings(grid)} == expected


def test_a_codebook_that_no_backend_offers_is_told():
    with pytest.raises(UserError, match=r"'grid'.*e8p, trellis"):
        Grid(("demo-llama",), ("gptq", "quip-sharp"), (2.5,), (0,), True, True, ("trellis", "grid"))


def test_a_backend_that_does_not_import_hinders_only_who_asks_for_it(monkeypatch, capsys):
    monkeypatch.setattr("casp_eval.casp_vs_baseline.backend_names", lambda: ["absent"])
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "absent" in capsys.readouterr().out
    with pytest.raises(UserError, match="'absent'"):
        Grid(("demo-llama",), ("absent",), (2.5,), (0,), True, True).kinds()
