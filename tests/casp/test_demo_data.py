"""The built-in texts and pictures: disjoint splits, the same every time, balanced, and one vendor kept unseen."""

from collections import Counter

import numpy as np
import pytest

from casp.demo import NAMES, assets_folder, scenes, text
from casp.errors import UserError

COUNT = 240


def layouts(split: str, count: int = COUNT) -> list[scenes.Layout]:
    """The layouts behind the first questions of a split."""
    found = []
    for number in range(count):
        rng = scenes.generator(split, number)
        kind, turn = scenes.KINDS[number % 6], number // 6
        found.append(scenes.layout(split, rng, scenes.filled_cells(kind, turn, rng)))
    return found


def test_names_and_assets() -> None:
    assert NAMES == ("demo-llama", "demo-llava", "demo-video")
    assert (assets_folder() / "tiles" / "index.json").is_file()


def test_scene_contents_of_the_splits_are_disjoint() -> None:
    digests = {split: {one.digest() for one in layouts(split, 600)} for split in scenes.SPLITS}
    for i, first in enumerate(scenes.SPLITS):
        for second in scenes.SPLITS[i + 1 :]:
            assert not digests[first] & digests[second], (first, second)


def test_the_unseen_vendor_draws_only_its_own_split() -> None:
    unseen = scenes.index()["unseen"]
    for split in scenes.SPLITS:
        vendors = {vendor for one in layouts(split) for _, _, vendor in one.drawings}
        assert vendors == {unseen} if split == "test-unseen" else unseen not in vendors, split


def test_questions_are_the_same_every_time() -> None:
    first, second = scenes.load("validation", 24), scenes.load("validation", 24)
    for a, b in zip(first, second, strict=True):
        assert (a.kind, a.question, a.answer, a.scene) == (b.kind, b.question, b.answer, b.scene)
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    assert first[0].image.size == (96, 96)


@pytest.mark.parametrize("split", ["test", "test-unseen"])
def test_kinds_and_answers_are_balanced(split: str) -> None:
    questions = scenes.load(split, COUNT)
    assert set(Counter(q.kind for q in questions).values()) == {COUNT // 6}
    answers = {kind: Counter(q.answer for q in questions if q.kind == kind) for kind in scenes.KINDS}
    assert set(answers["yes/no"].values()) == {COUNT // 12}
    assert set(answers["count"]) == set(scenes.NUMBERS)
    assert set(answers["count"].values()) == {COUNT // 24}
    assert set(answers["where"]) == set(scenes.CELLS)
    assert max(answers["name"].values()) <= 5


def test_answers_follow_from_the_layout() -> None:
    scene = scenes.Layout(((0, 3, "noto"), (3, 5, "noto")), 0)
    names, rng = scenes.words(), np.random.default_rng(0)
    cell = {names[3]: "top left", names[5]: "bottom right"}
    for _ in range(20):
        question, answer = scenes.ask("position", scene, rng)
        assert question == f"what is at the {cell[answer]}?"
        question, answer = scenes.ask("where", scene, rng)
        assert cell[question.removeprefix("where is the ").rstrip("?")] == answer
        question, answer = scenes.ask("yes/no", scene, rng, yes=False)
        assert answer == "no"
        assert not any(f" {name}?" in question for name in cell)
        assert scenes.ask("count", scene, rng)[1] == "two"


def test_texts_are_long_enough() -> None:
    texts = {split: text.load(split) for split in text.SPLITS}
    # Characters a token: 2.5 in code, 3 in dialogue and technical prose, 4 elsewhere, all rounded down.
    for split in text.CALIBRATION.values():
        assert len(texts[split]) > 128 / len(text.REGISTERS) * 512 * 3, split
    assert len(texts["calibration"]) > 256 * 512 * 4
    for split in text.VALIDATION.values():
        assert len(texts[split]) > 16 * 512 * 4, split
    for split in text.TEST:
        assert len(texts[split]) > 64 * 512 * 5, split
    assert "Ishmael" in texts["moby"]


def test_no_sentence_stands_in_two_texts() -> None:
    """No 20 words in a row are shared; shorter ones are set phrases ("God bless you, and ...")."""
    seen: dict[int, str] = {}
    for split in text.SPLITS:
        words_in = text.load(split).split()
        stretches = {hash(tuple(words_in[i : i + 20])): i for i in range(len(words_in) - 20)}
        shared = next((stretch for stretch in stretches if stretch in seen), None)
        assert shared is None, (split, seen[shared], " ".join(words_in[stretches[shared] :][:20]))
        seen |= dict.fromkeys(stretches, split)


def test_unknown_splits_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="'nowhere'"):
        text.load("nowhere")
    with pytest.raises(UserError, match="'nowhere'"):
        scenes.load("nowhere", 1)
