"""The names of data sets: what calibration draws from each, and the texts and questions of evaluations."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

from casp.data import hub
from casp.data.chats import Chat, Video, read_samples
from casp.data.mixture import STANDS_FOR, counts, shares
from casp.demo import clips, scenes, text
from casp.errors import UserError
from casp.model.modality import Visual
from casp.reading.files import is_there
from casp.reading.texts import read_prose

#: Built-in texts of one register each.
BUILT_IN_TEXTS = {f"demo-{register}": split for register, split in text.CALIBRATION.items()}
BUILT_IN_CHATS = {"demo-images": scenes, "demo-clips": clips}
BUILT_IN = (*STANDS_FOR, *BUILT_IN_CHATS, *BUILT_IN_TEXTS)
EVALUATION_TEXTS = (*text.VALIDATION.values(), *text.TEST, *hub.TEST)
#: Built-in questions -> where they come from, and the split.
EVALUATION_CHATS = {split: (scenes, split) for split in ("validation", "test", "test-unseen")} | {
    f"clips-{split}": (clips, split) for split in ("validation", "test", "test-unseen")
}
EVALUATION_SCENES = tuple(EVALUATION_CHATS)


@dataclass(frozen=True)
class Drawn:
    """What calibration takes of a set: a number of windows of one text or of documents, and chats."""

    text: str | Iterator[str] = ""
    windows: int = 0
    chats: list[Chat] = field(default_factory=list)


def draw(dataset: str, samples: int, rng: random.Random, frames: int = Visual.frames) -> Drawn:
    """`samples` of the set that a name stands for; of each video `frames` are to be looked at.

    A .jsonl gives windows of its texts, joined, and chats, as many of each as their share of the rows.
    """
    if dataset in BUILT_IN_TEXTS:
        return Drawn(text.load(BUILT_IN_TEXTS[dataset]), samples)
    if dataset in BUILT_IN_CHATS:
        # The split has no end: draw from enough of it that another seed draws other pictures.
        question = BUILT_IN_CHATS[dataset].question
        drawn = (question("calibration", i) for i in rng.sample(range(8 * samples), samples))
        return Drawn(chats=[_chat(one, dataset) for one in drawn])
    if dataset in hub.TRAINING:
        return Drawn(hub.training_text(dataset, rng), samples)
    path = _local(dataset)
    if path.suffix == ".txt":
        return Drawn(read_prose(path), samples)
    texts, chats = read_samples(path)
    rows = len(texts) + len(chats)
    parts = counts({"text": Fraction(len(texts), rows), "chats": Fraction(len(chats), rows)}, samples)
    wanted = parts.get("chats", 0)
    if len(chats) < wanted:
        raise UserError(f"{path} has only {len(chats)} chats for {wanted} samples: lower --samples or add rows")
    chosen = [replace(chat, frames=frames) for chat in rng.sample(chats, wanted)]
    return Drawn("\n\n".join(texts), parts.get("text", 0), chosen)


def check(dataset: str, multimodal: bool) -> None:
    """UserError where a data set's name, or a mixture, stands for what is no set, or shows pictures to a text model.

    Local files are read for it, the pictures that they name are not.
    """
    for name in shares(dataset, multimodal):
        chats: list[Chat] = []
        if name not in (*BUILT_IN_TEXTS, *BUILT_IN_CHATS, *hub.TRAINING):
            path = _local(name)
            if path.suffix == ".txt":
                read_prose(path)
            else:
                _, chats = read_samples(path)
        if not multimodal and (name in BUILT_IN_CHATS or any(any(chat.media()) for chat in chats)):
            raise UserError(f"{name} has images, and this is a text model: use a text set")


def _local(dataset: str) -> Path:
    """The .txt or .jsonl file that a data set's name is; UserError for another name."""
    path = _path(dataset)
    if path.suffix not in (".txt", ".jsonl"):
        names = ", ".join((*hub.TRAINING, *BUILT_IN))
        raise UserError(f"there is no data set '{dataset[:80]}': use {names}, or a local .txt or .jsonl file")
    return path


def files(dataset: str) -> list[Path]:
    """The local files among the sets that a data set's name, or a mixture, stands for."""
    paths = map(_path, shares(dataset, multimodal=True))
    return [path for path in paths if is_there(path) and path.is_file()]


def share_of_chats(dataset: str) -> float:
    """About how much of a multimodal model's data is chats, by its name alone: a .jsonl is not read, but counted so."""
    parts = shares(dataset, multimodal=True).items()
    return float(sum(share for name, share in parts if name in BUILT_IN_CHATS or name.endswith(".jsonl")))


def evaluation_text(name: str) -> str:
    """The text called `name`: one of EVALUATION_TEXTS, a .txt file, or the texts of a .jsonl file, joined."""
    if name in hub.TEST:
        return hub.test_text(name)
    if name in EVALUATION_TEXTS:
        return text.load(name)
    path = _path(name)
    if path.suffix == ".txt":
        return read_prose(path)
    if path.suffix != ".jsonl":
        names = ", ".join(EVALUATION_TEXTS)
        raise UserError(f"unknown text {name!r}: choose one of {names}, or a local .txt or .jsonl file")
    texts, _ = read_samples(path)
    if not texts:
        raise UserError(f"{path} has no rows with a text: give a .jsonl of {{'text'}} or a .txt file")
    return "\n\n".join(texts)


def evaluation_chats(name: str, count: int, seed: int, frames: int = Visual.frames) -> list[Chat]:
    """`count` chats (0 = all) of one of EVALUATION_SCENES or of a .jsonl file, with `frames` of each video.

    Of a .jsonl with more chats than `count`, `seed` draws which, and UserError where one of them does not open;
    built-in splits come in their fixed, balanced order.
    """
    if name in EVALUATION_CHATS:
        room, split = EVALUATION_CHATS[name]
        return [_chat(question, name) for question in (room.load(split, count) if count else room.load(split))]
    path = _path(name)
    if path.suffix != ".jsonl":
        names = ", ".join(EVALUATION_SCENES)
        raise UserError(f"unknown questions {name!r}: choose one of {names}, or a local .jsonl file")
    _, chats = read_samples(path)
    if not chats:
        raise UserError(f"{path} has no questions: give a .jsonl with rows of question and answer")
    if count and count < len(chats):
        chats = random.Random(seed).sample(chats, count)
    chats = [replace(chat, frames=frames) for chat in chats]
    for chat in chats:
        chat.opened()  # and dropped: what does not open is told before a model is loaded
    return chats


def _chat(question: scenes.Question | clips.Question, dataset: str) -> Chat:
    if isinstance(question, clips.Question):
        shown, source = Video(question.frames), f"clip {question.scene} of {dataset}"
    else:
        shown, source = question.image, f"picture {question.scene} of {dataset}"
    return Chat.about([shown], question.question, question.answer, source, question.kind)


def _path(name: str) -> Path:
    return Path(name).expanduser() if name.startswith("~/") else Path(name)
