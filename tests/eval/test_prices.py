"""What a plan's prices say beside what rounding costs, of every backend; what is refused."""

import json
from pathlib import Path

import pytest
from casp_eval.prices import main

from casp.backend import load_backend
from casp.moments.__main__ import main as collect
from casp.plan.costs import Pricing


@pytest.fixture(scope="module")
def sources(tiny_llama: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags that name `tiny_llama` and its moments."""
    folder = tmp_path_factory.mktemp("moments") / "moments"
    sizes = ["--samples", "2", "--sequence-length", "32", "--batch-size", "2"]
    collect(["--model", str(tiny_llama), "--dataset", str(texts), *sizes, "--output", str(folder)])
    return ["--model", str(tiny_llama), "--moments", str(folder)]


@pytest.mark.parametrize("backend", ["aqlm", "gptq", "quip-sharp"])
def test_prices_beside_what_rounding_costs(backend, sources, tmp_path):
    """A small matrix is tried whole; what is told by distortions stands beside it."""
    output = tmp_path / "prices.json"
    main(["--backend", backend, *sources, "--matrices", "0.k", "--output", str(output)])
    (found,) = json.loads(output.read_text())["prices"]
    assert found["matrix"] == "0.k"
    pricing = Pricing(load_backend(backend), low_rank=frozenset())
    tried = pricing.measured(pricing.formats(tuple(found["shape"])), tuple(found["shape"]))
    assert [row["format"] for row in found["formats"]] == pricing.formats(tuple(found["shape"]))
    for row in found["formats"]:
        assert 0 <= row["cost"] < 1
        assert row["few_rows"] == row["rows_of_a_plan"] > 0
        if row["format"] in tried:
            assert row["told"] == pytest.approx(row["rows_of_a_plan"])
        else:
            assert 0.5 < row["told"] / row["rows_of_a_plan"] < 2  # a bit makes a factor of 4


def test_what_is_no_matrix_and_no_backend(refused, sources, tmp_path):
    file = tmp_path / "prices.json"
    flags = [*sources, "--output", str(file)]
    assert "no BLOCK.ROLE" in refused(main, "--backend", "gptq", *flags, "--matrices", "9.k")
    assert "invalid choice: 'nvfp4'" in refused(main, "--backend", "nvfp4", *flags)
    assert not file.exists()
