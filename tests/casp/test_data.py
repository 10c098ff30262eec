"""Calibration: the same batches for the same seed, windows that do not overlap, padding that masks show."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from drawn import batches, decoded
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from casp.data import fingerprint
from casp.data.batches import _windows_of_text
from casp.errors import UserError
from casp.model.batch import Batch


def test_text_batches_are_exact_windows_of_the_file(tiny_llama: Path, text_file: Path):
    found = batches(tiny_llama, text_file)
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(3, 32), (3, 32), (2, 32)]
    assert all(batch["attention_mask"].all() for batch in found)
    content = text_file.read_text()
    assert all(text in content for text in decoded(tiny_llama, found))
    AutoModelForCausalLM.from_pretrained(tiny_llama)(**found[0])


def test_the_seed_decides_everything(tiny_llama: Path, text_file: Path):
    first = fingerprint(batches(tiny_llama, text_file, seed=1))
    assert first == fingerprint(batches(tiny_llama, text_file, seed=1))
    assert first != fingerprint(batches(tiny_llama, text_file, seed=2))


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 40),
    samples=st.integers(1, 20),
    spare=st.integers(0, 300),
    rng=st.randoms(use_true_random=False),
)
def test_windows_never_overlap(length: int, samples: int, spare: int, rng):
    def tokenizer(text: str, **_) -> dict:
        return {"input_ids": list(range(len(text)))}  # a token tells its place

    windows = _windows_of_text("x" * (samples * length + spare), "text", tokenizer, samples, length, rng)
    assert all(len(window) == length for window in windows)
    places = torch.cat(windows)
    assert len(places.unique()) == len(places) == samples * length


def test_a_text_that_just_fits_is_used_whole(tiny_llama: Path, text_file: Path):
    found = batches(tiny_llama, text_file, samples=8, sequence_length=500, batch_size=8)
    assert sorted(decoded(tiny_llama, found)) == sorted(
        text_file.read_text()[start : start + 500] for start in range(0, 4000, 500)
    )


def test_jsonl_of_texts(tiny_llama: Path, tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": letter * 99}) for letter in "abcdef"))
    joined = "\n\n".join(letter * 99 for letter in "abcdef")
    assert all(text in joined for text in decoded(tiny_llama, batches(tiny_llama, path)))


def test_text_for_a_multimodal_model(tiny_llava: Path, text_file: Path):
    found = batches(tiny_llava, text_file)
    assert set(found[0]) == {"input_ids", "attention_mask"}
    AutoModelForImageTextToText.from_pretrained(tiny_llava)(**found[0])


def test_a_text_has_no_answers(tiny_llama: Path, text_file: Path):
    assert all(batch.answers is None for batch in batches(tiny_llama, text_file))


def test_built_in_texts_are_of_the_calibration_splits(tiny_llama: Path, tiny_llava: Path, monkeypatch):
    from casp.demo import text

    splits, original = [], text.load
    monkeypatch.setattr(text, "load", lambda split: (splits.append(split), original(split)[:5000])[1])
    found = batches(tiny_llama, "demo-mixed", samples=10)
    assert fingerprint(found) == fingerprint(batches(tiny_llama, "demo-registers", samples=10))
    assert fingerprint(found) == fingerprint(batches(tiny_llava, "demo-registers", samples=10))
    assert splits == [*text.CALIBRATION.values()] * 3


@pytest.mark.parametrize("name", ["demo-text", "demo-speeches"])
def test_the_speeches_are_cut_as_they_were_when_they_were_all_the_built_in_text(demo_llama: Path, name: str):
    """SHA-256 of the batches of the default data before other registers joined: earlier figures can be made again."""
    found = batches(demo_llama, name, samples=128, sequence_length=512, batch_size=8)
    assert fingerprint(found) == "93d0de41d9293eda5198368110436c54ccee158665424fda8dd2719447b8566b"


def test_a_model_whose_blocks_read_pictures_alone_gets_no_text_by_default(tiny_llava: Path, tmp_path: Path, capsys):
    """As Mllama, whose cross-attention does not run where a batch has no picture."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llava, model)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["cross_attention_layers"] = [1]
    (model / "config.json").write_text(json.dumps(config))
    found = batches(model, "demo", samples=13)
    assert sum(len(batch["pixel_values"]) for batch in found) == 13
    assert "calibrated on demo-images, without text" in capsys.readouterr().out
    assert any("pixel_values" not in batch for batch in batches(tiny_llava, "demo", samples=13))


def test_built_in_images_are_of_the_calibration_split(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch):
    from casp.demo import scenes

    splits, original = [], scenes.question
    monkeypatch.setattr(scenes, "question", lambda split, i: (splits.append(split), original(split, i))[1])
    found = batches(tiny_llava, "demo-images")
    assert splits == ["calibration"] * 8
    assert sum(len(batch["pixel_values"]) for batch in found) == 8
    assert fingerprint(found) != fingerprint(batches(tiny_llava, "demo-images", seed=1))


def test_the_built_in_llava_takes_its_calibration(demo_llava: Path):
    found = batches(demo_llava, "demo", samples=13, batch_size=2)
    model = AutoModelForImageTextToText.from_pretrained(demo_llava)
    assert all(model(**batch).logits.isfinite().all() for batch in found)


def test_the_built_in_video_model_takes_its_calibration(demo_video: Path):
    found = batches(demo_video, "demo-clips", samples=2, batch_size=2)
    assert [tuple(batch["pixel_values_videos"].shape) for batch in found] == [(2, 4, 3, 96, 96)]
    model = AutoModelForImageTextToText.from_pretrained(demo_video)
    assert all(model(**batch).logits.isfinite().all() for batch in found)
    assert fingerprint(found) != fingerprint(batches(demo_video, "demo-clips", samples=2, batch_size=2, seed=1))


def test_clips_for_a_model_of_pictures_are_refused_by_name(demo_llava: Path):
    with pytest.raises(UserError, match=r"reads no videos, and clip \d+ of demo-clips has one"):
        batches(demo_llava, "demo-clips", samples=2, batch_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"sequence_length": -1}, "sequence length must be at least 1"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"sequence_length": 513}, "more than the 512 positions .*lower --sequence-length"),
        ({"samples": 126}, "has 4000 tokens, fewer than 126 samples of 32: lower --samples"),
    ],
)
def test_impossible_sizes(tiny_llama: Path, text_file: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        batches(tiny_llama, text_file, **changes)


@pytest.mark.parametrize("name", ["wikitext3", "demo-audio", "data.csv"])
def test_unknown_set(tiny_llama: Path, name: str):
    with pytest.raises(UserError, match=f"no data set '{name}': use rp, c4, wikitext2, ptb, demo"):
        batches(tiny_llama, name)


def test_unreadable_files(tiny_llama: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"missing.txt cannot be read .no such file"):
        batches(tiny_llama, tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8"):
        batches(tiny_llama, tmp_path / "latin.txt")


def test_fingerprint_sees_values_names_types_shapes_and_order():
    base = [{"a": torch.arange(6), "b": torch.zeros(2)}]
    others = [
        [{"a": torch.arange(6), "b": torch.zeros(3)}],
        [{"a": torch.arange(6).reshape(2, 3), "b": torch.zeros(2)}],
        [{"a": torch.arange(6).int(), "b": torch.zeros(2)}],
        [{"a": torch.arange(6), "c": torch.zeros(2)}],
        [{"a": torch.arange(6)}, {"b": torch.zeros(2)}],
        [{"a": torch.arange(6), "b": torch.tensor([0.0, 1.0])}],
        [{"a": torch.arange(6), "b": torch.zeros(2, dtype=torch.bfloat16)}],
        *([Batch.of_chats(dict(base[0]), torch.tensor([first, True]))] for first in (False, True)),
    ]
    assert len({fingerprint(found) for found in [base, *others]}) == 10
    assert fingerprint([{"b": torch.zeros(2), "a": torch.arange(6)}]) == fingerprint(base)


def test_parts_of_a_mixture_without_a_sample_are_told(tiny_llama: Path, capsys: pytest.CaptureFixture):
    batches(tiny_llama, "demo", samples=3, batch_size=1)
    told = capsys.readouterr().err
    assert "3 samples are too few for all of demo: none of demo-technical, demo-code" in told
    batches(tiny_llama, "demo", samples=5, batch_size=1)
    assert "too few" not in capsys.readouterr().err
