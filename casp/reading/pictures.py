"""Pictures in local files, decoded only when their size is known to be reasonable."""

import warnings
from pathlib import Path
from typing import IO

from PIL import Image

from casp.errors import UserError, told_as
from casp.reading.files import require_file

MOST_PIXELS = 50_000_000
MOST_FORM = 100  # times as long as wide: beyond it no processor makes anything of a picture


def open_picture(path: str | Path, source: str = "") -> Image.Image:
    """The picture in a file, decoded, RGB. source: where its path came from, for messages ("line 3 of data.jsonl")."""
    path = Path(path)
    what = f"{source}: the image {path}" if source else f"the image {path}"
    require_file(path, what.removesuffix(f" {path}"))
    return read_picture(path, what)


def read_picture(source: Path | IO[bytes], what: str) -> Image.Image:
    """The picture in `source`, decoded, RGB; UserError, which calls it `what`, for one that cannot be used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower, and is told
        with told_as(f"{what} does not open", "give a PNG, JPEG or WebP file"), Image.open(source) as image:
            _check_size(what, *image.size)
            return image.convert("RGB")


def _check_size(what: str, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UserError(f"{what} of {width}x{height} pixels, at most {MOST_PIXELS} are read; scale it down.")
    if max(width, height) > MOST_FORM * min(width, height):
        raise UserError(f"{what} of {width}x{height} pixels is too narrow; crop it.")
