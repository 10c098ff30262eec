"""Frames of local videos: of a video file, or of a folder that holds them as pictures."""

from pathlib import Path

import numpy as np
from PIL import Image

from casp.errors import UserError, told_as
from casp.reading.files import is_folder, require_file
from casp.reading.pictures import MOST_PIXELS, MOST_TOGETHER, check_size, open_picture

FRAME_FILES = {".png", ".jpg", ".jpeg", ".webp"}
MOST_FRAMES = 100_000  # of a file: an hour at 25 frames a second
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,flv,mpeg,mpegts,ogg,gif,ivf,h264,hevc,m4v"
"""What FFmpeg may take a file for, by its contents: files that hold pictures, none that names other files."""


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Numbers of `wanted` frames of `count`, the first and the last among them; all where there are fewer."""
    return sorted({int(place) for place in np.linspace(0, count - 1, min(wanted, count)).round()})


def open_frames(path: Path, wanted: int, source: str, most: int = MOST_TOGETHER) -> tuple[Image.Image, ...]:
    """At most `wanted` frames of the video at `path`, evenly spaced in time, RGB, all of one size.

    path: a video file, or a folder of pictures in the order of their names; source: where the path came from, for
    messages; most: pixels of all frames together. UserError for what does not open.
    """
    if is_folder(path, f"{source}: the video"):
        return _frames_of_folder(path, wanted, source, most)
    what = f"{source}: the video {path}"
    require_file(path, f"{source}: the video")
    with told_as(f"{what} does not open", "give a video file that FFmpeg reads, or a folder of frames"):
        return _frames_of_file(path, wanted, what, most)


def _frames_of_folder(path: Path, wanted: int, source: str, most: int) -> tuple[Image.Image, ...]:
    try:
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in FRAME_FILES)
    except OSError as error:
        raise UserError(f"{source}: the folder {path} cannot be read ({error.strerror}); correct the path.") from error
    if not files:
        raise UserError(f"{source}: the folder {path} holds no frames; give pictures as {', '.join(FRAME_FILES)}.")
    frames: tuple[Image.Image, ...] = ()
    for place in evenly_spaced(len(files), wanted):
        frames += (open_picture(files[place], source, most),)
        most -= frames[-1].width * frames[-1].height
    if len({frame.size for frame in frames}) > 1:
        raise UserError(f"{source}: the frames in {path} are not of one size; scale them to one.")
    return frames


def _frames_of_file(path: Path, wanted: int, what: str, most: int) -> tuple[Image.Image, ...]:
    import av  # loads FFmpeg's libraries: only those who read videos wait for it

    def opened() -> av.container.InputContainer:
        return av.open(str(path), options={"format_whitelist": FORMATS})

    with opened() as container:
        if not container.streams.video:
            raise UserError(f"{what} has no pictures in it; give another file.")
        stream = container.streams.video[0]
        size = (stream.width, stream.height)
        check_size(what, *size, most)
        # The header may be wrong about their number, and seeking is not exact in all formats: count, then decode.
        count = sum(packet.size > 0 for packet in container.demux(stream))
    if not 1 <= count <= MOST_FRAMES:
        raise UserError(f"{what} has {count} frames, not 1 to {MOST_FRAMES}; cut it.")
    check_size(what, *size, most, min(count, wanted))
    places = set(evenly_spaced(count, wanted))
    frames: list[Image.Image] = []
    with opened() as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        for place, frame in enumerate(container.decode(stream)):
            if (frame.width, frame.height) != size:
                raise UserError(
                    f"{what} says that its frames are {size[0]}x{size[1]} and holds one of "
                    f"{frame.width}x{frame.height}; give another file."
                )
            if place in places:
                frames.append(frame.to_image().convert("RGB"))
    if not frames:
        raise UserError(f"{what} holds no frame that decodes; give another file.")
    return tuple(frames)
