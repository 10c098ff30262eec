"""Batches of chats and batches of text in one calibration set, through the moments and every stage that reads them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor
from transformers import AutoModelForImageTextToText

from casp.data import calibration_batches
from casp.moments import backward
from casp.moments.__main__ import main as collect
from casp.moments.weights import typical_energy

SHARES = "demo-images:2,demo-text:1"
DATA = ["--dataset", SHARES, "--samples", 9, "--sequence-length", 40, "--batch-size", 2]


@pytest.fixture(scope="module")
def mixed_moments(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory, run_module: Callable) -> Path:
    """Moments of the inputs and, backward, of the gradients, over pictures and text together."""
    folder = tmp_path_factory.mktemp("mixed") / "moments"
    done = run_module("casp.moments", "--model", tiny_llava, "--output", folder, *DATA)
    assert done.returncode == 0, done.stderr
    return folder


def test_energies_are_bounded_by_kind(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Six chats and three windows of text, each called what it is, and the record says so."""
    seen = []

    def look(energies: Tensor, counts: Tensor, chats: Tensor) -> float:
        seen.append((counts, chats))
        return typical_energy(energies, counts, chats)

    monkeypatch.setattr(backward, "typical_energy", look)
    collect(["--model", str(tiny_llava), "--output", str(tmp_path / "out"), *map(str, DATA)])
    for counts, chats in seen:
        assert chats.sum() == 6
        assert counts[~chats].tolist() == [40] * 3
    assert '"energies": "bounded by kind"' in (tmp_path / "out" / "casp_run.json").read_text()


@pytest.mark.parametrize("collected", [False, True], ids=["on the way", "collected"])
@pytest.mark.parametrize(
    "stage",
    [
        ["casp_svd", "--keep-ratio", "0.5"],
        ["casp_gptq", "--bits", "4", "--from-original"],
        ["casp_quip_sharp", "--from-original", "--ft-epochs", "1"],
    ],
    ids=lambda stage: stage[0],
)
def test_a_stage_takes_chats_and_text_together(
    tiny_llava: Path, mixed_moments: Path, tmp_path: Path, run_module: Callable, stage: list[str], collected: bool
):
    data = [*DATA, "--moments", mixed_moments if collected else "none"]
    done = run_module(stage[0], "--model", tiny_llava, "--output", tmp_path / "out", *data, *stage[1:])
    assert done.returncode == 0, done.stderr
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    batches = calibration_batches(tiny_llava, SHARES, 9, 40, 1, 2)
    assert {"pixel_values" in batch for batch in batches} == {True, False}
    assert all(model(**batch).logits.isfinite().all() for batch in batches)
