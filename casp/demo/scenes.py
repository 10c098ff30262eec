"""Pictures to ask about: emoji drawn by several vendors, one large or up to four in a 2x2 grid, and short questions.

Everything follows from (split, index). The scene contents of the splits are disjoint: a layout (which drawing of
which vendor in which cell, on which background) belongs to the split that its hash names. The vendor of
'test-unseen' draws nothing in the other splits.
"""

import functools
import hashlib
import json
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from casp.demo import assets_folder
from casp.errors import UserError

SIDE = 96
SPLITS = ("train", "calibration", "validation", "test", "test-unseen")
SHARES = {"train": range(0, 70), "calibration": range(70, 80), "validation": range(80, 90), "test": range(90, 100)}
KINDS = ("name", "category", "position", "where", "yes/no", "count")
CELLS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("one", "two", "three", "four")
COLOURS = ("white", "#f4ead2", "#d9ecf7", "#dff2d8", "#f7dbe3", "#e6e0f5", "#d8d8d8", "#fdf3b0", "#c5e3da", "#9fb6c9")


@dataclass(frozen=True)
class Layout:
    """What a picture shows: (cell, concept, vendor) of each drawing, and the background; cell None = one large."""

    drawings: tuple[tuple[int | None, int, str], ...]
    background: int

    @property
    def single(self) -> bool:
        """One large drawing instead of a grid."""
        return self.drawings[0][0] is None

    def digest(self) -> str:
        """A hash of the content, the same in every process."""
        return hashlib.sha256(repr((self.drawings, self.background)).encode()).hexdigest()


@dataclass(frozen=True)
class Question:
    """A picture, a question about it and its short answer; `scene` numbers the pictures of a split."""

    image: Image.Image
    kind: str
    question: str
    answer: str
    scene: int


@functools.cache
def index() -> dict:
    """What assets/tiles/index.json says: concepts, categories, vendors, licences."""
    return json.loads((assets_folder() / "tiles" / "index.json").read_text())


def words() -> list[str]:
    """The names of the concepts."""
    return [concept["word"] for concept in index()["concepts"]]


@functools.cache
def tile(vendor: str, concept: int, side: int) -> Image.Image:
    """One drawing as an RGBA image of the given side."""
    size, columns = index()["side"], index()["columns"]
    left, top = concept % columns * size, concept // columns * size
    return _sheet(vendor).crop((left, top, left + size, top + size)).resize((side, side), Image.Resampling.BICUBIC)


@functools.cache
def _sheet(vendor: str) -> Image.Image:
    return Image.open(assets_folder() / "tiles" / f"{vendor}.png").convert("RGBA")


def generator(split: str, number: int) -> np.random.Generator:
    """The source of all choices made for one scene."""
    seed = hashlib.sha256(f"{split}:{number}".encode()).digest()[:8]
    return np.random.default_rng(int.from_bytes(seed, "little"))


@functools.cache
def drawings(split: str) -> list[tuple[int, tuple[str, ...]]]:
    """Concepts and the vendors that draw them in a split."""
    unseen = index()["unseen"]
    rows = []
    for number, concept in enumerate(index()["concepts"]):
        vendors = tuple(v for v in concept["vendors"] if (v == unseen) == (split == "test-unseen"))
        rows.append((number, vendors))
    return rows


def layout(split: str, rng: np.random.Generator, filled: int | None) -> Layout:
    """A random layout of a split with `filled` cells of the grid, or one large drawing (None)."""
    if split not in SPLITS:
        raise UserError(f"the built-in pictures have no split '{split}': choose one of {', '.join(SPLITS)}")
    rows = drawings(split)
    while True:
        shown = rng.choice(len(rows), size=filled or 1, replace=False)
        cells = [None] if filled is None else sorted(int(c) for c in rng.choice(4, size=filled, replace=False))
        shapes = tuple(
            (cell, int(number), str(rng.choice(rows[number][1]))) for cell, number in zip(cells, shown, strict=True)
        )
        candidate = Layout(shapes, int(rng.integers(len(COLOURS))))
        if belongs(candidate.digest(), split):
            return candidate


def belongs(digest: str, split: str) -> bool:
    """Whether what has this hash is of the split; 'test-unseen' is told by its vendor alone."""
    return split == "test-unseen" or int(digest[:8], 16) % 100 in SHARES[split]


def draw(scene: Layout, rng: np.random.Generator) -> Image.Image:
    """Paint a layout: sizes, places, brightness and saturation vary a little."""
    image = Image.new("RGB", (SIDE, SIDE), COLOURS[scene.background])
    for cell, concept, vendor in scene.drawings:
        box = SIDE if cell is None else SIDE // 2
        side = int(rng.integers(84, 91)) if cell is None else int(rng.integers(42, 46))
        left, top = ((box - side) // 2 + int(v) for v in rng.integers(*((-2, 3) if cell is None else (-1, 2)), size=2))
        if cell is not None:
            left, top = left + cell % 2 * box, top + cell // 2 * box
        drawn = tile(vendor, concept, side)
        image.paste(drawn, (left, top), drawn)
    image = ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.88, 1.1)))
    return ImageEnhance.Color(image).enhance(float(rng.uniform(0.85, 1.15)))


def ask(kind: str, scene: Layout, rng: np.random.Generator, yes: bool = True) -> tuple[str, str]:
    """A question of one kind about a layout, and its answer; `yes` decides the answer of a yes/no question."""
    names, concepts = words(), index()["concepts"]
    cell, concept, _ = scene.drawings[int(rng.integers(len(scene.drawings)))]
    if kind == "name":
        return "what is this?", names[concept]
    if kind == "category":
        return "what kind of thing is this?", concepts[concept]["category"]
    if kind == "position":
        return f"what is at the {CELLS[cell]}?", names[concept]
    if kind == "where":
        return f"where is the {names[concept]}?", CELLS[cell]
    if kind == "count":
        return "how many drawings are there?", NUMBERS[len(scene.drawings) - 1]
    if not yes:
        shown = {number for _, number, _ in scene.drawings}
        alike = [n for n, c in enumerate(concepts) if c["category"] == concepts[concept]["category"]]
        pool = [n for n in (alike if rng.random() < 0.5 else range(len(concepts))) if n not in shown]
        concept = int(rng.choice(pool))
    article = "an" if names[concept][0] in "aeiou" else "a"
    return f"is there {article} {names[concept]}?", "yes" if yes else "no"


def filled_cells(kind: str, number: int, rng: np.random.Generator) -> int | None:
    """How many cells are filled in the picture for question `number` of a kind; None = one large drawing."""
    if kind in ("name", "category"):
        return None
    if kind == "count":
        return 1 + number % 4
    if kind == "yes/no":
        return (None, 1, 2, 3, 4)[int(rng.integers(5))]
    return int(rng.integers(2, 5))


def question(split: str, number: int) -> Question:
    """Question `number` of a split, on a picture of its own; the kinds take turns."""
    rng = generator(split, number)
    kind, turn = KINDS[number % len(KINDS)], number // len(KINDS)
    scene = layout(split, rng, filled_cells(kind, turn, rng))
    text, answer = ask(kind, scene, rng, yes=turn % 2 == 0)
    return Question(draw(scene, rng), kind, text, answer, number)


def load(split: str, count: int = 600) -> list[Question]:
    """The first `count` questions of a split, balanced over the kinds and over yes and no."""
    if split not in SPLITS:
        raise UserError(f"the built-in pictures have no split '{split}': choose one of {', '.join(SPLITS)}")
    return [question(split, number) for number in range(count)]
