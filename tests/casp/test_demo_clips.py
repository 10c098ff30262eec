"""The built-in clips: disjoint splits, the same every time, balanced, and answers that the frames show."""

import re
from collections import Counter

import numpy as np
import pytest

from casp.demo import clips, scenes
from casp.errors import UserError

COUNT = 144


def asked(split: str, number: int) -> tuple[clips.Clip, str, str]:
    """The clip behind a question of a split, its question and answer; nothing is painted."""
    rng = scenes.generator(f"clips-{split}", number)
    kind, turn = clips.KINDS[number % len(clips.KINDS)], number // len(clips.KINDS)
    clip, end = clips.clip_for(kind, split, rng, turn)
    return clip, *clips.ask(kind, clip, rng, end)


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[tuple[clips.Clip, str, str]]]:
    return {split: [asked(split, number) for number in range(COUNT)] for split in clips.SPLITS}


def test_no_clip_is_of_two_splits(drawn) -> None:
    digests = {split: {clip.digest() for clip, _, _ in rows} for split, rows in drawn.items()}
    for i, first in enumerate(clips.SPLITS):
        for second in clips.SPLITS[i + 1 :]:
            assert not digests[first] & digests[second], (first, second)


def test_the_unseen_vendor_draws_only_its_own_split(drawn) -> None:
    unseen = scenes.index()["unseen"]
    for split, rows in drawn.items():
        vendors = {drawing[2] for clip, _, _ in rows for frame in clip.frames for drawing in frame.drawings}
        assert vendors == {unseen} if split == "test-unseen" else unseen not in vendors, split


def test_clips_are_the_same_every_time() -> None:
    first, second = clips.load("validation", 12), clips.load("validation", 12)
    for a, b in zip(first, second, strict=True):
        assert (a.kind, a.question, a.answer, a.scene) == (b.kind, b.question, b.answer, b.scene)
        assert [np.asarray(frame).tobytes() for frame in a.frames] == [np.asarray(f).tobytes() for f in b.frames]
    assert [frame.size for frame in first[0].frames] == [(96, 96)] * clips.FRAMES
    assert (first[0].question, first[0].answer) == asked("validation", 0)[1:]


def test_every_clip_changes_once_or_twice_and_keeps_its_background(drawn) -> None:
    for rows in drawn.values():
        for clip, _, _ in rows:
            changes = sum(a != b for a, b in zip(clip.frames, clip.frames[1:], strict=False))
            assert changes in (1, 2)
            assert len({frame.background for frame in clip.frames}) == 1


def test_kinds_and_answers_are_balanced(drawn) -> None:
    for rows in drawn.values():
        answers = {kind: Counter(row[2] for row in rows[i::6]) for i, kind in enumerate(clips.KINDS)}
        assert set(answers["count"]) == set(scenes.NUMBERS)
        assert set(answers["count"].values()) == {COUNT // 24}
        assert set(answers["where"]) == set(scenes.CELLS)
        assert set(answers["direction"]) == {"left", "right", "up", "down"}
        assert max(answers["direction"].values()) <= COUNT // 10
        assert max(answers["order"].values()) <= 5


def test_answers_follow_from_the_frames(drawn) -> None:
    names = scenes.words()

    def shown(frame: scenes.Layout) -> dict[str, int | None]:
        return {names[concept]: cell for cell, concept, _ in frame.drawings}

    for clip, question, answer in (row for rows in drawn.values() for row in rows):
        frames = [shown(frame) for frame in clip.frames]
        end = frames[-1 if "at the end" in question else 0]
        if found := re.fullmatch(r"what is shown at the (start|end)\?", question):
            assert list(end) == [answer]
        elif found := re.fullmatch(r"what comes after the (.+)\?", question):
            last = max(i for i, frame in enumerate(frames) if found[1] in frame)
            assert list(frames[last + 1]) == [answer]
        elif found := re.fullmatch(r"where is the (.+) at the (start|end)\?", question):
            assert scenes.CELLS[end[found[1]]] == answer
        elif found := re.fullmatch(r"which way does the (.+) move\?", question):
            before, after = divmod(frames[0][found[1]], 2), divmod(frames[-1][found[1]], 2)
            step = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[answer]
            assert (before[0] + step[0], before[1] + step[1]) == after
        elif question.startswith("what "):
            come, gone = set(frames[-1]) - set(frames[0]), set(frames[0]) - set(frames[-1])
            assert {answer} == (come if question == "what appears?" else gone)
            assert not (gone if question == "what appears?" else come)
        else:
            assert question.startswith("how many drawings are there at the ")
            assert scenes.NUMBERS[len(end) - 1] == answer


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="'nowhere'"):
        clips.load("nowhere", 1)
