"""Clips to ask about: four frames in which a drawing moves, appears, goes or takes another's place, short questions.

Everything follows from (split, index). Drawings, backgrounds and splits are those of `scenes`: a clip belongs to the
split that the hash of all its frames names, and the vendor of 'test-unseen' draws nothing in the other splits.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from casp.demo import scenes
from casp.demo.scenes import CELLS, COLOURS, NUMBERS, SPLITS, Layout
from casp.errors import UserError

FRAMES = 4
KINDS = ("order", "after", "where", "direction", "change", "count")
ENDS = ("start", "end")
WAYS = {
    (0, 1): "right",
    (2, 3): "right",
    (1, 0): "left",
    (3, 2): "left",
    (0, 2): "down",
    (1, 3): "down",
    (2, 0): "up",
    (3, 1): "up",
}
"""(cell before, cell after) -> the way between them, for neighbours in the 2x2 grid."""


@dataclass(frozen=True)
class Clip:
    """What a clip shows, frame by frame."""

    frames: tuple[Layout, ...]

    def digest(self) -> str:
        """A hash of the content, the same in every process."""
        return hashlib.sha256("".join(frame.digest() for frame in self.frames).encode()).hexdigest()

    def at(self, end: str) -> Layout:
        """The first frame ("start") or the last ("end")."""
        return self.frames[0 if end == "start" else -1]


@dataclass(frozen=True)
class Question:
    """A clip, a question about it and its short answer; `scene` numbers the clips of a split."""

    frames: tuple[Image.Image, ...]
    kind: str
    question: str
    answer: str
    scene: int


def replaced(split: str, rng: np.random.Generator, things: int) -> Clip:
    """`things` large drawings, one after the other."""

    def candidate() -> Clip:
        shown = _things(split, rng, things)
        begins = [0, *sorted(int(f) for f in rng.choice(np.arange(1, FRAMES), size=things - 1, replace=False))]
        background = int(rng.integers(len(COLOURS)))
        turns = [sum(begin <= frame for begin in begins) - 1 for frame in range(FRAMES)]
        return Clip(tuple(Layout(((None, *shown[turn]),), background) for turn in turns))

    return _in_split(split, candidate)


def moved(split: str, rng: np.random.Generator, things: int) -> Clip:
    """`things` (1 to 3) drawings in the grid, of which one moves to a free cell beside its own."""

    def candidate() -> Clip:
        shown = _things(split, rng, things)
        before, after = list(WAYS)[int(rng.integers(len(WAYS)))]
        free = [cell for cell in range(4) if cell not in (before, after)]
        cells = [int(cell) for cell in rng.permutation(free)[: things - 1]]
        when, background = int(rng.integers(1, FRAMES)), int(rng.integers(len(COLOURS)))
        places = [[before if frame < when else after, *cells] for frame in range(FRAMES)]
        return Clip(tuple(_grid(zip(place, shown, strict=True), background) for place in places))

    return _in_split(split, candidate)


def changed(split: str, rng: np.random.Generator, first: int, last: int) -> Clip:
    """`first` drawings in the grid (1 to 4), then `last`: some appear or some go, all at once."""

    def candidate() -> Clip:
        most = max(first, last)
        shown = list(zip((int(cell) for cell in rng.permutation(4)[:most]), _things(split, rng, most), strict=True))
        when, background = int(rng.integers(1, FRAMES)), int(rng.integers(len(COLOURS)))
        numbers = [first if frame < when else last for frame in range(FRAMES)]
        return Clip(tuple(_grid(shown[:number], background) for number in numbers))

    return _in_split(split, candidate)


def draw(clip: Clip, rng: np.random.Generator) -> tuple[Image.Image, ...]:
    """Paint the frames: sizes, places, brightness and saturation vary a little from frame to frame."""
    return tuple(scenes.draw(frame, rng) for frame in clip.frames)


def ask(kind: str, clip: Clip, rng: np.random.Generator, end: str = "start") -> tuple[str, str]:
    """A question of one kind about a clip that has an answer, and this; `end`: which end of the clip it is about."""
    names = scenes.words()
    first, last = ({drawing[1]: drawing[0] for drawing in clip.at(side).drawings} for side in ENDS)
    if kind == "order":
        return f"what is shown at the {end}?", names[clip.at(end).drawings[0][1]]
    if kind == "after":
        shown = list(dict.fromkeys(frame.drawings[0][1] for frame in clip.frames))
        which = int(rng.integers(len(shown) - 1))
        return f"what comes after the {names[shown[which]]}?", names[shown[which + 1]]
    if kind == "where":
        cell, concept, _ = clip.at(end).drawings[int(rng.integers(len(clip.at(end).drawings)))]
        return f"where is the {names[concept]} at the {end}?", CELLS[cell]
    if kind == "direction":
        concept = next(concept for concept in first if last[concept] != first[concept])
        return f"which way does the {names[concept]} move?", WAYS[first[concept], last[concept]]
    if kind == "change":
        (concept,) = set(first) ^ set(last)
        return "what appears?" if concept in last else "what disappears?", names[concept]
    return f"how many drawings are there at the {end}?", NUMBERS[len(clip.at(end).drawings) - 1]


def clip_for(kind: str, split: str, rng: np.random.Generator, turn: int) -> tuple[Clip, str]:
    """A clip that question `turn` of a kind can be about, and the end that it asks about."""
    end = ENDS[turn % 2]
    if kind in ("order", "after"):
        return replaced(split, rng, int(rng.integers(2, 4))), end
    if kind in ("where", "direction"):
        return moved(split, rng, int(rng.integers(1, 4))), end
    if kind == "change":
        few = int(rng.integers(1, 4))
        return changed(split, rng, *((few, few + 1) if turn % 2 else (few + 1, few))), end
    asked = 1 + turn // 2 % 4
    other = int(rng.choice([number for number in range(1, 5) if number != asked]))
    return changed(split, rng, *((asked, other) if end == "start" else (other, asked))), end


def question(split: str, number: int) -> Question:
    """Question `number` of a split, on a clip of its own; the kinds take turns."""
    if split not in SPLITS:
        raise UserError(f"the built-in clips have no split '{split}': choose one of {', '.join(SPLITS)}")
    rng = scenes.generator(f"clips-{split}", number)
    kind, turn = KINDS[number % len(KINDS)], number // len(KINDS)
    clip, end = clip_for(kind, split, rng, turn)
    text, answer = ask(kind, clip, rng, end)
    return Question(draw(clip, rng), kind, text, answer, number)


def load(split: str, count: int = 600) -> list[Question]:
    """The first `count` questions of a split, balanced over the kinds."""
    return [question(split, number) for number in range(count)]


def _things(split: str, rng: np.random.Generator, count: int) -> list[tuple[int, str]]:
    """Different concepts, each as one of its vendors in the split draws it."""
    rows = scenes.drawings(split)
    chosen = [rows[int(row)] for row in rng.choice(len(rows), size=count, replace=False)]
    return [(number, str(rng.choice(vendors))) for number, vendors in chosen]


def _grid(placed: Iterable[tuple[int, tuple[int, str]]], background: int) -> Layout:
    """A frame of the grid from (cell, (concept, vendor)) of its drawings."""
    return Layout(tuple(sorted((cell, *thing) for cell, thing in placed)), background)


def _in_split(split: str, candidate: Callable[[], Clip]) -> Clip:
    """The first clip that `candidate` draws which belongs to the split."""
    while True:
        clip = candidate()
        if scenes.belongs(clip.digest(), split):
            return clip
