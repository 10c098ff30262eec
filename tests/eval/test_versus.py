"""What the comparison of CASP with its baselines keeps, reuses and removes."""

import json

import pytest
from casp_eval.casp_vs_baseline import COLUMNS, Making, Setting, Workshop, kept_row, main

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


@pytest.mark.parametrize("text", ["{}", "[]", "", json.dumps(dict.fromkeys(COLUMNS - {"bpw"}))])
def test_what_is_no_row_is_told(tmp_path, text):
    file = tmp_path / "row.json"
    file.write_text(text)
    with pytest.raises(UserError, match="measure it again"):
        kept_row(file)


def test_the_report_goes_into_no_model_and_over_no_other_files(tmp_path, tiny_llama):
    (tmp_path / "report.md").write_text("# Thesis")
    for output, words in ((tiny_llama, "of a model"), (tmp_path, "exists"), (tiny_llama / "config.json/out", "cannot")):
        with pytest.raises(UserError, match=words):
            main(["--output", str(output), "--work", str(tmp_path / "work")])
    assert (tmp_path / "report.md").read_text() == "# Thesis"
