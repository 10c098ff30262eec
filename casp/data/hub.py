"""Text sets of the hub: what is drawn from them to calibrate on, and the texts that evaluations read."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from casp.errors import UserError, in_brief

if TYPE_CHECKING:
    import datasets

#: Rows that are held in memory to shuffle a streamed set.
SHUFFLE_BUFFER = 1000


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

TRAINING = {
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

#: name: (arguments of `load_dataset`, column, what joins the documents, how many documents).
#: The choices of the GPTQ paper's evaluation (arXiv 2210.17323), which the papers after it kept.
TEST: dict[str, tuple[dict[str, Any], str, str, int | None]] = {
    "wikitext2": ({"path": "wikitext", "name": "wikitext-2-raw-v1", "split": "test"}, "text", "\n\n", None),
    "ptb": (
        {
            "path": "ptb-text-only/ptb_text_only",
            "revision": "refs/convert/parquet",
            "data_files": {"test": "penn_treebank/test/*.parquet"},
            "split": "test",
        },
        "sentence",
        " ",
        None,
    ),
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


def training_text(name: str, rng: random.Random) -> str | Iterator[str]:
    """The training split of a set: one text, or its documents in a random order."""
    hub = TRAINING[name]
    try:
        parts = [_load({**arguments, "split": "train"}) for arguments in hub.parts]
    except Exception as error:  # no connection, a renamed repository, a refused token, ...: each has its own class
        raise _unreachable(name, error) from error
    if hub.separator is not None:
        return hub.separator.join(hub.text(row) for part in parts for row in part)
    seed = rng.randrange(2**31)
    shuffled = [part.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) for part in parts]
    return _documents(name, shuffled, rng)


def test_text(name: str) -> str:
    """The text that papers report perplexity on."""
    arguments, column, joint, documents = TEST[name]
    try:
        return joint.join(_load(arguments)[column][:documents])
    except Exception as error:
        raise UserError(
            f"the text '{name}' cannot be fetched from the hub ({in_brief(error)}): check the connection, or give a "
            "local .txt or .jsonl file"
        ) from error


def _load(arguments: dict[str, Any]) -> Any:
    import datasets  # takes a second to import: only those who use the hub wait for it

    return datasets.load_dataset(**arguments)


def _documents(dataset: str, parts: list["datasets.IterableDataset"], rng: random.Random) -> Iterator[str]:
    """The texts of streamed parts, mixed by their shares."""
    hub = TRAINING[dataset]
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
