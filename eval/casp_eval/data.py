"""What checkpoints are evaluated on: texts, and questions about images; built-in, from the hub, or local files."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from casp.errors import UserError
from casp.reading.pictures import open_picture
from casp.reading.texts import read_prose, read_rows, string_of

TEXTS = ("validation", "test", "moby")
SCENES = ("validation", "test", "test-unseen")
HUB_TEXTS: dict[str, tuple[dict[str, Any], str, str, int | None]] = {
    # name: (arguments of datasets.load_dataset, column, what joins the documents, how many documents).
    # The choices of the GPTQ paper's evaluation (arXiv 2210.17323), which the papers after it kept.
    "wikitext2": ({"path": "wikitext", "name": "wikitext-2-raw-v1", "split": "test"}, "text", "\n\n", None),
    "ptb": ({"path": "ptb_text_only", "name": "penn_treebank", "split": "test"}, "sentence", " ", None),
    "c4": (
        {
            "path": "allenai/c4",
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            "split": "validation",
        },
        "text",
        " ",
        1100,
    ),
}


def load_text(name: str) -> str:
    """The text called `name`: a built-in split, a hub data set, or the path of a .txt file (UTF-8)."""
    if name in TEXTS:
        from casp.demo import text

        return text.load(name)
    if name in HUB_TEXTS:
        return _hub_text(name)
    path = Path(name)
    if path.suffix != ".txt":
        raise UserError(f"unknown text {name!r}: choose one of {', '.join((*TEXTS, *HUB_TEXTS))}, or a local .txt file")
    return read_prose(path)


def _hub_text(name: str) -> str:
    from datasets import load_dataset

    arguments, column, joint, documents = HUB_TEXTS[name]
    try:
        rows = load_dataset(**arguments)
    except Exception as error:  # `datasets` has no common base for unreachable, missing and moved data sets
        raise UserError(
            f"the data set {name!r} cannot be fetched from the hub ({type(error).__name__}): check the connection, "
            f"or use a built-in text ({', '.join(TEXTS)}) or a local .txt file"
        ) from error
    return joint.join(rows[column][:documents])


@dataclass(frozen=True)
class Item:
    """One question about one image, with the answer that counts as right. kind groups questions in reports."""

    image: Image.Image
    kind: str
    question: str
    answer: str


def load_questions(name: str, count: int, seed: int) -> list[Item]:
    """`count` questions of a built-in split or of a .jsonl of {"image", "question", "answer", "kind"} (0 = all).

    Image paths in a .jsonl are relative to it; "kind" may be left out. Of a .jsonl with more rows than
    `count`, `seed` draws which are asked; built-in splits come in their fixed, balanced order.
    """
    if name in SCENES:
        from casp.demo import scenes

        rows = scenes.load(name, count) if count else scenes.load(name)
        return [Item(row.image, row.kind, row.question, row.answer) for row in rows]
    path = Path(name)
    if path.suffix != ".jsonl":
        raise UserError(f"unknown questions {name!r}: choose one of {', '.join(SCENES)}, or a local .jsonl file")
    return _local_questions(path, count, seed)


def _local_questions(path: Path, count: int, seed: int) -> list[Item]:
    rows = []
    for number, row in read_rows(path):
        source = f"line {number} of {path}"
        fields = {key: string_of(row, key, source) for key in ("image", "question")}
        fields["answer"] = string_of(row, "answer", source, number_too=True)
        kind = string_of(row, "kind", source) if "kind" in row else "question"
        rows.append((source, fields, kind))
    if count and count < len(rows):
        rows = random.Random(seed).sample(rows, count)
    return [
        Item(open_picture(path.parent / fields["image"], source), kind, fields["question"], fields["answer"])
        for source, fields, kind in rows
    ]


def text_fingerprint(text: str) -> str:
    """sha256 of a text, so that a cached figure is never shown for another text."""
    return hashlib.sha256(text.encode()).hexdigest()


def questions_fingerprint(items: list[Item]) -> str:
    """sha256 over questions, answers and pixels."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.kind, item.question, item.answer, item.image.size]).encode())
        digest.update(item.image.convert("RGB").tobytes())
    return digest.hexdigest()
