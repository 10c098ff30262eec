"""Mixtures of calibration sets: what a name stands for, how samples are shared out, and the batches that come of it."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casp.data import calibration_batches, mixture, sources
from casp.demo import text
from casp.errors import UserError

PARTS = st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 50), min_size=1)


@settings(deadline=None)
@given(weights=PARTS, samples=st.integers(1, 300))
def test_counts_are_the_shares_to_within_one_sample(weights: dict[str, int], samples: int) -> None:
    total = sum(weights.values())
    counts = mixture.counts({name: Fraction(weight, total) for name, weight in weights.items()}, samples)
    assert sum(counts.values()) == samples
    assert all(count > 0 for count in counts.values())
    assert all(abs(counts.get(name, 0) - samples * weight / total) < 1 for name, weight in weights.items())


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_interleaved_lists_keep_their_order_and_are_spread_evenly(lengths: list[int]) -> None:
    found = mixture.interleaved(*([(n, i) for i in range(length)] for n, length in enumerate(lengths)))
    assert Counter(found) == Counter((n, i) for n, length in enumerate(lengths) for i in range(length))
    for n, length in enumerate(lengths):
        assert [i for m, i in found if m == n] == list(range(length))
        for cut in range(len(found)):  # each list's share of every beginning is its share of the whole, rounded
            before = sum(m == n for m, _ in found[:cut])
            assert abs(before - cut * length / len(found)) <= len(lengths) / 2 + 1e-9


def test_names_stand_for_sets_and_shares() -> None:
    assert mixture.shares("some.txt", False) == {"some.txt": 1}
    assert mixture.shares("a.txt:3,b.jsonl:0.5,a.txt:0.5", False) == {
        "a.txt": Fraction(7, 8),
        "b.jsonl": Fraction(1, 8),
    }
    texts = mixture.shares("demo-mixed", False)
    assert texts == mixture.shares("demo-registers", True)
    assert set(texts) == {f"demo-{register}" for register in text.REGISTERS}
    both = mixture.shares("demo-mixed", True)
    assert sum(both.values()) == sum(texts.values()) == 1
    assert {name: share / (1 - both["demo-images"]) for name, share in both.items() if name in texts} == texts
    with pytest.raises(UserError, match="all 0"):
        mixture.shares("a.txt:0", False)


def test_a_mixture_of_texts_has_windows_of_each(tiny_llama: Path, tmp_path: Path) -> None:
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 500)
    batches = calibration_batches(tiny_llama, f"{tmp_path}/a.txt:3,{tmp_path}/b.txt:1", 16, 24, 0, 5)
    assert [len(batch["input_ids"]) for batch in batches] == [5, 5, 5, 1]
    windows = torch.cat([batch["input_ids"] for batch in batches])
    assert all(len(set(window.tolist())) == 1 for window in windows)
    assert sorted(Counter(windows[:, 0].tolist()).values()) == [4, 12]


def test_the_default_has_every_register_and_chats_where_there_are_pictures() -> None:
    assert mixture.shares("demo", False) == mixture.shares("demo-registers", False)
    chats_and_text = mixture.shares("demo", True)
    assert chats_and_text["demo-images"] == Fraction(12, 13)
    assert chats_and_text.keys() - {"demo-images"} == mixture.shares("demo-registers", True).keys()
    assert mixture.shares("demo-text", False) == mixture.shares("demo-text", True) == {"demo-speeches": 1}


def test_the_mixture_of_a_multimodal_model_has_batches_of_chats_and_of_text(tiny_llava: Path) -> None:
    share = 1 - mixture.shares("demo-mixed", True)["demo-images"]
    batches = calibration_batches(tiny_llava, "demo-mixed", 65, 48, 0, 2)
    chats = sum(len(batch["input_ids"]) for batch in batches if "pixel_values" in batch)
    texts = [batch for batch in batches if "pixel_values" not in batch]
    assert chats == 65 * (1 - share)
    assert {batch["input_ids"].shape[1] for batch in texts} == {48}
    assert sum(len(batch["input_ids"]) for batch in texts) == 65 - chats


def test_what_a_text_model_cannot_take_is_refused_by_name(tiny_llama: Path) -> None:
    with pytest.raises(UserError, match="demo-images has images"):
        calibration_batches(tiny_llama, "demo-images:1,demo-text:1", 4, 24, 0, 2)


def test_the_files_of_a_mixture_are_its_local_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stages protect from being written over."""
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    a, b = tmp_path / "a.txt", tmp_path / "b.jsonl"
    assert set(sources.files(f"{a}:2,demo-mixed:1,~/b.jsonl:1,c4:1")) == {a, b}
    assert sources.files(str(a)) == [a]
    assert sources.files("demo") == sources.files("wikitext2") == []


def test_the_share_of_chats_is_that_of_pictures_and_rows() -> None:
    assert sources.share_of_chats("demo-images") == sources.share_of_chats("some.jsonl") == 1
    assert sources.share_of_chats("demo") == pytest.approx(12 / 13)
    assert sources.share_of_chats("c4") == sources.share_of_chats("demo-text") == 0
    assert sources.share_of_chats("demo-images:1,some.txt:3") == 0.25
