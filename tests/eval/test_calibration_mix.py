"""What calibration keeps: the figures that are drawn from a comparison, and the whole on a tiny model."""

import json
import math
import re

import pytest
from casp_eval.calibration_mix import excess, main, table

from casp.errors import UserError


def row(texts: dict[str, float], answers: float | None = None) -> dict:
    return {"perplexity_texts": texts, "perplexity_image_text": answers}


def test_excess_is_the_difference_of_mean_losses():
    original = row({"a": math.exp(3.0), "b": math.exp(1.0)}, math.exp(0.5))
    found = excess(row({"a": math.exp(3.25), "b": math.exp(2.0)}, math.exp(0.75)), original)
    assert found == pytest.approx({"a": 0.25, "b": 1.0, "answers": 0.25})
    assert set(excess(row({"a": 2.0}), row({"a": 1.0}))) == {"a"}


def test_the_table_leaves_answers_out_of_the_mean_of_texts():
    result = {"dataset": "x", "samples": 3, "excess": {"a": 0.2, "b": 0.6, "answers": 9.0}}
    result |= {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6]}
    cells = [cell.strip() for cell in table([result]).splitlines()[-1].strip("|").split("|")]
    assert cells == ["`x`", "3", "0.200", "0.600", "9.000", "0.400", "3.00", "50.0% (40–60)"]


@pytest.mark.parametrize(
    "candidate", ["demo-text", "demo-text@", "demo-text@0", "@4", "demo-text@²", "demo-text@" + "9" * 5000]
)
def test_what_is_no_set_with_a_number_of_samples(tmp_path, candidate):
    with pytest.raises(UserError, match="is not DATASET@SAMPLES"):
        main(["--model", "m", "--work", str(tmp_path / "w"), "--output", str(tmp_path / "o.json"), candidate])


def test_a_file_of_others_is_not_replaced(tiny_llama, tmp_path):
    output = tmp_path / "mine.json"
    output.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="holds no figures"):
        main(["--model", str(tiny_llama), "--work", str(tmp_path / "w"), "--output", str(output), "demo-text@4"])
    assert output.read_text() == '{"mine": 1}'
    (tmp_path / "page.md").write_text("mine")
    for name in ("page.json", "page.md", "other.md"):
        with pytest.raises(UserError, match=r"\.md"):
            main(["--model", str(tiny_llama), "--work", "w", "--output", str(tmp_path / name), "demo-text@4"])
    assert (tmp_path / "page.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["demo-text@2", "demo-txet@2"], "there is no data set 'demo-txet'"),
        (["demo-text@2", "demo-images@2"], "demo-images has images"),
        (["demo-text@2", "{model}/config.json.txt@2"], "config.json.txt"),
        (["demo-text@2", "--device", "cuda:99"], "CUDA devices here"),
        (["demo-text@2", "--work", "/"], "the root of the file system"),
        (["demo-text@2", "--work", "{model}/work"], "an input of this run"),
        (["demo-text@2", "--work", "{dir}/notes.txt"], "cannot be made"),
        (["demo-text@2", "--output", "{dir}/work/compared-validation/report.json"], "an input of this run"),
        (["demo-text@2", "--output", "{dir}/notes.txt/mix.json"], "cannot be"),
        (["demo-text@2", "--output", "{dir}/beside.json"], "beside.md"),
        (["demo-text@2", "--work", "{dir}/others"], "holds other files"),
    ],
)
def test_all_is_told_before_the_first_set_is_calibrated_on(tiny_llama, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("a stage was started"))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "beside.md").write_text("mine")
    (tmp_path / "others/demo-text-2/moments").mkdir(parents=True)
    (tmp_path / "others/demo-text-2/moments/notes.txt").write_text("mine")
    given = [flag.replace("{model}", str(tiny_llama)).replace("{dir}", str(tmp_path)) for flag in flags]
    places = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "mix.json")]
    with pytest.raises(UserError, match=re.escape(words)):
        main(["--model", str(tiny_llama), *places, *given])
    assert not (tmp_path / "mix.json").exists()


def test_a_set_that_fails_ends_with_what_its_stage_said(tiny_llama, tmp_path, capfd):
    """Too short a text is known to the stage alone; it is told once, not again by the command above it."""
    (tmp_path / "short.txt").write_text("hello")
    places = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "new" / "mix.json")]
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(tiny_llama), *places, f"{tmp_path}/short.txt@4"])
    assert ended.value.code == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "tokens" in errors[0]


def test_a_ratio_of_losses_that_are_none_is_not_shown():
    result = {"dataset": "x", "samples": 3, "excess": {"a": 0.0, "b": 0.6}, "accuracy": None}
    assert table([result]).splitlines()[-1].endswith("| 0.300 | – |")


@pytest.mark.slow
def test_every_set_makes_its_checkpoint_and_a_row(tiny_llama, tmp_path, texts):
    output = tmp_path / "mix.json"
    sets = [f"{texts}@2", f"{texts}@4"]
    sizes = ["--work", tmp_path / "work", "--output", output, "--windows", 1]
    main(["--model", str(tiny_llama), *map(str, sizes), *sets])
    written = json.loads(output.read_text())
    assert [(one["dataset"], one["samples"]) for one in written["results"]] == [(str(texts), 2), (str(texts), 4)]
    assert set(written["results"][0]["excess"]) == set(written["original"]["perplexity_texts"])
    assert table(written["results"]) in output.with_suffix(".md").read_text()
