"""Documents of the built-in task for lmms-eval, whose data must come from a file: it names a split, no more.

The harness loads this file by its path, not as a part of a package.
"""

from pathlib import Path
from typing import Any

import datasets
from casp_eval.tasks.built_in import judged, rows
from PIL import Image

TEST = {"test": str(Path(__file__).with_name("test.jsonl"))}
TEST_UNSEEN = {"test": str(Path(__file__).with_name("test-unseen.jsonl"))}

__all__ = ["TEST", "TEST_UNSEEN", "judged", "questions", "shown"]


def questions(named: datasets.Dataset) -> datasets.Dataset:
    """The questions of the split that the only row of `named` names."""
    return datasets.Dataset.from_list(rows(named[0]["split"]))


def shown(document: dict[str, Any]) -> list[Image.Image]:
    """The picture of a question."""
    return [document["image"]]
