"""The comparison with the published algorithm: both files on a tiny model; what it refuses before it measures."""

import json
import shutil
from pathlib import Path

import pytest
from casp_aqlm.compare_published import main

from casp.errors import UserError
from casp.moments.__main__ import main as collect

QUICK = ["--scheme", "1x4g4", "--seconds", "0.5", "--matrices", "0.k"]


@pytest.fixture(scope="module")
def moments(tiny_llama: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Moments of `tiny_llama`."""
    folder = tmp_path_factory.mktemp("moments") / "moments"
    sizes = ["--samples", "2", "--sequence-length", "32", "--batch-size", "2"]
    collect(["--model", str(tiny_llama), "--dataset", str(texts), *sizes, "--output", str(folder)])
    return folder


def compared(model: Path, moments: Path, output: Path, *more: str) -> None:
    main(["--model", str(model), "--moments", str(moments), "--output", str(output), *QUICK, *more])


def test_figures_and_picture(tiny_llama, moments, tmp_path):
    output = tmp_path / "new" / "loss.json"
    for _ in range(2):  # its own may be replaced
        compared(tiny_llama, moments, output)
    (found,) = json.loads(output.read_text())["matrices"]
    assert found["matrix"] == "0.k"
    assert all(0 < loss < 1 for key in ("ours", "published") for _, loss in found[key])
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.suffix for path in output.parent.iterdir()) == [".json", ".png"]


def test_neither_figures_nor_picture_replace_what_others_made(tiny_llama, moments, tmp_path):
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    (tmp_path / "photo.png").write_bytes(b"mine")
    (tmp_path / "link.png").symlink_to("nowhere")
    inputs = [tiny_llama / "loss.json", moments / "loss.json", tiny_llama / "config.json"]
    names = ("mine.json", "photo.json", "photo.png", "link.json", "new.png", "mine.json/x.json")
    for place in (*(tmp_path / name for name in names), tmp_path, *inputs):
        with pytest.raises(UserError, match="choose another"):
            compared(tiny_llama, moments, place)
    assert (tmp_path / "mine.json").read_text() == '{"mine": 1}'
    assert (tmp_path / "photo.png").read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "flags",
    [
        ["--matrices", "0.k", "99.q"],
        ["--matrices", "².q"],
        ["--matrices", "0.thesis"],
        ["--seconds", "nan"],
        ["--seconds", "0"],
        ["--seed", str(2**70)],
    ],
    ids=" ".join,
)
def test_what_cannot_be_compared(tiny_llama, moments, tmp_path, flags):
    with pytest.raises(UserError):
        compared(tiny_llama, moments, tmp_path / "loss.json", *flags)
    assert not list(tmp_path.iterdir())


def test_moments_are_of_this_model(tiny_llama, moments, tmp_path):
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    with pytest.raises(UserError, match="another model"):
        compared(other, moments, tmp_path / "loss.json")
