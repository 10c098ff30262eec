"""Documents of the built-in task for lm-eval, which loads this file by its path, not as a part of a package."""

from typing import Any

import datasets
from casp_eval.tasks.built_in import judged, rows

__all__ = ["judged", "questions"]


def questions(split: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The questions of one built-in split, under the name that the task file has for it."""
    return {"test": datasets.Dataset.from_list(rows(split))}
