"""Pictures in local files, decoded only when their size is known to be reasonable."""

import warnings
from pathlib import Path
from typing import IO

from PIL import Image

from casp.errors import UserError, told_as
from casp.reading.files import require_file

MOST_PIXELS = 50_000_000
MOST_TOGETHER = 3 * MOST_PIXELS
"""Pixels of all pictures and frames of one chat: 0.6 GB as Pillow keeps them, 18 frames of a video in 4K."""
MOST_FORM = 100  # times as long as wide: beyond it no processor makes anything of a picture


def open_picture(path: str | Path, source: str = "", most: int = MOST_PIXELS) -> Image.Image:
    """The picture in a file, decoded, RGB. source: where its path came from, for messages ("line 3 of data.jsonl").

    most: pixels; UserError for a picture of more, before it is decoded.
    """
    path = Path(path)
    what = f"{source}: the image {path}" if source else f"the image {path}"
    require_file(path, what.removesuffix(f" {path}"))
    return read_picture(path, what, most)


def read_picture(source: Path | IO[bytes], what: str, most: int = MOST_PIXELS) -> Image.Image:
    """The picture in `source`, decoded, RGB; UserError, which calls it `what`, for one that cannot be used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower, and is told
        with told_as(f"{what} does not open", "give a PNG, JPEG or WebP file"), Image.open(source) as image:
            check_size(what, *image.size, most)
            return image.convert("RGB")


def check_size(what: str, width: int, height: int, most: int, frames: int = 1) -> None:
    """UserError for a picture, or `frames` of a video, that is decoded to more than MOST_PIXELS or `most` pixels."""
    if width * height > MOST_PIXELS:
        raise UserError(f"{what} of {width}x{height} pixels, at most {MOST_PIXELS} are read; scale it down.")
    if width * height * frames > most:
        size = f"{frames} frames of {width}x{height}" if frames > 1 else f"{width}x{height}"
        raise UserError(
            f"{what}, {size} pixels, makes more than {MOST_TOGETHER} with what is shown beside it; scale them down or "
            "show fewer."
        )
    if max(width, height) > MOST_FORM * min(width, height):
        raise UserError(f"{what} of {width}x{height} pixels is too narrow; crop it.")
