"""The built-in texts: State of the Union speeches and Moby Dick, both in the public domain."""

from __future__ import annotations

from casp.demo import assets_folder
from casp.errors import UserError

SPLITS = ("calibration", "validation", "test", "moby")


def load(split: str) -> str:
    """One text: speeches up to 1990 (calibration), of 1991-2000 (validation), later (test), or Moby Dick."""
    if split not in SPLITS:
        raise UserError(f"the built-in text has no split '{split}': choose one of {', '.join(SPLITS)}")
    return (assets_folder() / "text" / f"{split}.txt").read_text(encoding="utf-8")
