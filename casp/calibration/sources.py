"""Where calibration data comes from: text sets of the hub, local files, the built-in set."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from casp.errors import UserError, in_brief
from casp.reading.pictures import open_picture
from casp.reading.texts import read_prose, read_rows, string_of

if TYPE_CHECKING:
    import datasets

BUILT_IN = ("demo", "demo-text", "demo-images")

#: Rows that are held in memory to shuffle a streamed set.
SHUFFLE_BUFFER = 1000


@dataclass(frozen=True)
class Chat:
    """A picture, a question about it and the answer; `source` says in error messages where it came from."""

    image: Image.Image
    question: str
    answer: str
    source: str

    def messages(self) -> list[dict[str, Any]]:
        """The chat as a processor's `apply_chat_template` takes it."""
        question = [{"type": "image", "image": self.image}, {"type": "text", "text": self.question}]
        answer = [{"type": "text", "text": self.answer}]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@dataclass(frozen=True)
class HubText:
    """A text set of the hub: the arguments of `load_dataset` for each part, and how to read a row.

    `separator` joins all rows to one text; without it each row is a document that gives at most one window.
    """

    parts: tuple[dict[str, Any], ...]
    text: Callable[[dict[str, Any]], str]
    separator: str | None = None
    shares: tuple[float, ...] = (1.0,)  # of the documents, drawn from each part


# The sample of RedPajama comes with a loading script, which `datasets` no longer runs, and the "meta" columns
# of its files do not fit one schema: the files are read as lines, each line as JSON. Shares = megabytes.
_RED_PAJAMA = {
    "arxiv": 93,
    "book": 111,
    "c4": 866,
    "cc_2019-30": 689,
    "cc_2020-05": 836,
    "cc_2021-04": 802,
    "cc_2022-05": 737,
    "cc_2023-06": 857,
    "github": 222,
    "stackexchange": 81,
    "wikipedia": 119,
}
_RED_PAJAMA_FILE = "hf://datasets/togethercomputer/RedPajama-Data-1T-Sample/{}_sample.jsonl"

HUB = {
    "rp": HubText(
        parts=tuple(
            {"path": "text", "data_files": _RED_PAJAMA_FILE.format(name), "streaming": True} for name in _RED_PAJAMA
        ),
        shares=tuple(size / sum(_RED_PAJAMA.values()) for size in _RED_PAJAMA.values()),
        text=lambda row: json.loads(row["text"])["text"],
    ),
    "c4": HubText(
        parts=(
            {
                "path": "allenai/c4",
                "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
                "streaming": True,
            },
        ),
        text=lambda row: row["text"],
    ),
    "wikitext2": HubText(
        parts=({"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},),
        text=lambda row: row["text"],
        separator="\n\n",
    ),
    # This one has a loading script too; the hub keeps its rows as Parquet files on a branch of their own.
    "ptb": HubText(
        parts=(
            {
                "path": "ptb-text-only/ptb_text_only",
                "revision": "refs/convert/parquet",
                "data_files": {"train": "penn_treebank/train/*.parquet"},
            },
        ),
        text=lambda row: row["sentence"],
        separator=" ",
    ),
}


def find(dataset: str, multimodal: bool, samples: int, rng: random.Random) -> str | Iterator[str] | list[Chat]:
    """What a data set's name stands for: one text, documents in a random order, or `samples` chats."""
    if dataset == "demo":
        dataset = "demo-images" if multimodal else "demo-text"
    if dataset == "demo-text":
        from casp.demo import text

        return text.load("calibration")
    if dataset == "demo-images":
        from casp.demo import scenes

        # The split has no end: draw from enough of it that another seed draws other pictures.
        questions = (scenes.question("calibration", i) for i in rng.sample(range(8 * samples), samples))
        return [Chat(q.image, q.question, q.answer, f"picture {q.scene} of demo-images") for q in questions]
    if dataset in HUB:
        return _hub_text(dataset, rng)
    path = Path(dataset)
    if dataset.startswith("~/"):
        path = path.expanduser()
    if path.suffix not in (".txt", ".jsonl"):
        names = ", ".join((*HUB, *BUILT_IN))
        raise UserError(f"there is no data set '{dataset}': use {names}, or a local .txt or .jsonl file")
    return read_prose(path) if path.suffix == ".txt" else _jsonl(path, samples, rng)


def _hub_text(dataset: str, rng: random.Random) -> str | Iterator[str]:
    """The training split of a hub set: one text, or its documents in a random order."""
    import datasets  # takes a second to import: only those who use the hub wait for it

    hub = HUB[dataset]
    try:
        parts = [datasets.load_dataset(**arguments, split="train") for arguments in hub.parts]
    except Exception as error:  # no connection, a renamed repository, a refused token, ...: each has its own class
        raise _unreachable(dataset, error) from error
    if hub.separator is not None:
        return hub.separator.join(hub.text(row) for part in parts for row in part)
    seed = rng.randrange(2**31)
    shuffled = [part.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) for part in parts]
    return _documents(dataset, shuffled, rng)


def _documents(dataset: str, parts: list[datasets.IterableDataset], rng: random.Random) -> Iterator[str]:
    """The texts of streamed parts, mixed by their shares."""
    hub = HUB[dataset]
    try:
        streams = [(iter(part), share) for part, share in zip(parts, hub.shares, strict=True)]
        while streams:
            drawn = rng.choices(streams, weights=[share for _, share in streams])[0]
            row = next(drawn[0], None)
            if row is None:
                streams.remove(drawn)
            else:
                yield hub.text(row)
    except Exception as error:  # a connection may break on the way
        raise _unreachable(dataset, error) from error


def _unreachable(dataset: str, error: Exception) -> UserError:
    return UserError(
        f"cannot load the data set '{dataset}' from the hub ({in_brief(error)}): check the connection, or"
        " give --dataset a local .txt or .jsonl file or 'demo'"
    )


def _jsonl(path: Path, samples: int, rng: random.Random) -> str | list[Chat]:
    """The text of all rows, or the chats of `samples` rows drawn at random; every row is checked."""
    rows: list[tuple[str, dict[str, str]]] = []
    kind: tuple[str, ...] = ()
    for number, row in read_rows(path):
        source = f"line {number} of {path}"
        fields = ("text",) if "text" in row else ("image", "question", "answer")
        if not all(field in row for field in fields):
            raise UserError(
                f"{source} has neither {{'text'}} nor {{'image', 'question', 'answer'}} as strings:"
                " correct or remove it"
            )
        if kind and fields != kind:
            raise UserError(
                f"{source} is of another kind than the lines before it: keep text and images in separate files"
            )
        kind = fields
        rows.append((source, {field: string_of(row, field, source) for field in fields}))
    if kind == ("text",):
        return "\n\n".join(row["text"] for _, row in rows)
    if len(rows) < samples:
        raise UserError(f"{path} has only {len(rows)} rows for {samples} samples: lower --samples or add rows")
    return [
        Chat(open_picture(path.parent / row["image"], source), row["question"], row["answer"], source)
        for source, row in rng.sample(rows, samples)
    ]
