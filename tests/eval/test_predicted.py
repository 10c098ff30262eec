"""Predicted against measured damage on a tiny model; what it refuses before anything is measured."""

import json
import shutil
from pathlib import Path

import pytest
from casp_eval.correlation import spearman
from casp_eval.predicted import main

from casp.moments.__main__ import main as collect
from casp.plan.__main__ import main as plan

SIZES = ["--samples", "2", "--sequence-length", "32", "--batch-size", "2"]


@pytest.fixture(scope="module")
def priced(tiny_llama: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Moments of `tiny_llama` and its options' prices for GPTQ."""
    folder = tmp_path_factory.mktemp("priced")
    found = {"moments": folder / "moments", "costs": folder / "costs"}
    model = ["--model", str(tiny_llama)]
    collect([*model, "--dataset", str(texts), *SIZES, "--output", str(found["moments"])])
    places = [word for name, place in found.items() for word in (f"--{name}", str(place))]
    plan([*model, "--backend", "gptq", "--bits", "3.5", *places, "--output", str(folder / "plan.json")])
    return found


def flags(model: Path, texts: Path, priced: dict[str, Path], *more: object) -> list[str]:
    places = [word for name, place in priced.items() for word in (f"--{name}", place)]
    return [*map(str, ["--model", model, "--backend", "gptq", "--dataset", texts, *SIZES, *places, *more])]


def test_every_draw_has_a_row(tiny_llama, texts, priced, tmp_path):
    file = tmp_path / "new" / "figures.json"
    for _ in range(2):  # its own figures may be written anew
        main(flags(tiny_llama, texts, priced, "--draws", 4, "--output", file))
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 4
    assert all(row["measured"] >= -1e-6 and row["predicted"] >= 0 for row in found["rows"])
    assert -1 <= found["spearman"] <= 1


def test_an_input_is_no_output(refused, tiny_llama, texts, priced):
    config = tiny_llama / "config.json"
    before = config.read_bytes()
    said = refused(main, *flags(tiny_llama, texts, priced, "--output", config))
    assert "choose another --output" in said
    assert config.read_bytes() == before
    for place in (tiny_llama / "new.json", priced["moments"] / "new.json", priced["costs"] / "new.json", texts):
        assert "an input of this run" in refused(main, *flags(tiny_llama, texts, priced, "--output", place))


def test_what_others_made_is_no_output(refused, tiny_llama, texts, priced, tmp_path):
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    for place in (tmp_path, tmp_path / "mine.json"):
        said = refused(main, *flags(tiny_llama, texts, priced, "--output", place))
        assert "holds no figures of this tool" in said
    assert (tmp_path / "mine.json").read_text() == '{"mine": 1}'


def test_prices_and_moments_are_of_this_model(refused, tiny_llama, tiny_llava, texts, priced, tmp_path):
    assert "another model" in refused(main, *flags(tiny_llava, texts, priced))
    other = shutil.copytree(priced["costs"], tmp_path / "costs")
    record = json.loads((other / "casp_run.json").read_text())
    record["fingerprint"]["model"] = "0" * 64
    (other / "casp_run.json").write_text(json.dumps(record))
    for wrong in (other, priced["moments"], tmp_path / "nowhere"):
        said = refused(main, *flags(tiny_llama, texts, {**priced, "costs": wrong}))
        assert "holds no prices of" in said


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([1, 2, 4], [1, 3, 9], 1), ([1, 2, 4], [3, 2, 1], -1), ([1, 1, 1], [1, 2, 3], None), ([1], [2], None)],
)
def test_a_correlation_of_what_is_all_alike_is_undefined(one, other, expected, recwarn):
    assert spearman(one, other)["spearman"] == expected
    assert "NaN" not in json.dumps([spearman(one, other), spearman([1, 2], [2, 1])])
    assert not recwarn.list
