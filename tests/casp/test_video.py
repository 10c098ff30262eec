"""Videos: frames from files and folders, and as samples of a video model."""

import io
import json
import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from casp.data import calibration_batches, chats
from casp.data.chats import Chat, Video, read_samples
from casp.errors import UserError
from casp.model.modality import Visual
from casp.reading.video import evenly_spaced, open_frames


@given(count=st.integers(1, 500), wanted=st.integers(1, 64))
def test_frames_are_evenly_spaced(count, wanted):
    places = evenly_spaced(count, wanted)
    assert len(places) == min(count, wanted)
    assert places[0] == 0
    assert wanted == 1 or places[-1] == count - 1
    gaps = np.diff(places)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def grey_frames(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (64, 48), (number * 8,) * 3).save(folder / f"{number:03}.png")
    return folder


def test_a_folder_of_frames(tmp_path):
    frames = open_frames(grey_frames(tmp_path / "clip", 30), 4, "here")
    assert [np.asarray(frame).max() // 8 for frame in frames] == [0, 10, 19, 29]
    Image.new("RGB", (10, 10)).save(tmp_path / "clip" / "000.png")
    with pytest.raises(UserError, match="not of one size"):
        open_frames(tmp_path / "clip", 4, "here")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no frames"):
        open_frames(tmp_path / "empty", 4, "here")


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b", "nowhere", "notes.txt/clip", "fifo"])
def test_what_is_neither_a_file_nor_a_folder_is_told(tmp_path, name):
    (tmp_path / "notes.txt").write_text("no video")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="line 3: the video"):
        open_frames(tmp_path / name, 4, "line 3")


def test_what_a_chat_shows_is_bounded_as_a_whole(tmp_path, monkeypatch):
    """Each picture may be of a size that is read, and all together fill the memory."""
    monkeypatch.setattr(chats, "MOST_TOGETHER", 5 * 64 * 48)
    clip = Video(grey_frames(tmp_path / "clip", 6))
    picture = tmp_path / "clip" / "000.png"
    assert replace(Chat.about([clip, picture], "What?", "grey", "line 3"), frames=4).opened().videos()
    for shown, frames in (([clip], 6), ([clip, picture, picture], 4), ([picture] * 6, 1)):
        with pytest.raises(UserError, match=r"line 3: the image .* with what is shown beside it"):
            replace(Chat.about(shown, "What?", "grey", "line 3"), frames=frames).opened()
    about = Chat.about([Video(write_clip(tmp_path / "a.mp4", 8))], "What?", "grey", "line 3")
    assert len(replace(about, frames=5).opened().videos()[0].frames) == 5
    with pytest.raises(UserError, match="6 frames of 64x48 pixels, makes more than"):
        replace(about, frames=6).opened()


def test_more_pictures_than_any_model_reads_are_refused_unopened(tmp_path):
    row = {"images": ["nowhere.png"] * 257, "question": "What?", "answer": "grey"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="shows 257 pictures and videos, at most 256"):
        read_samples(tmp_path / "rows.jsonl")


def write_clip(file: Path, count: int) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(count):
            picture = np.full((48, 64, 3), number * 8, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file


def test_a_video_file(tmp_path):
    frames = open_frames(write_clip(tmp_path / "clip.mp4", 30), 4, "here")
    assert [frame.size for frame in frames] == [(64, 48)] * 4
    found = [np.asarray(frame).mean() for frame in frames]
    assert np.allclose(found, [0, 80, 152, 232], atol=4)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    with pytest.raises(UserError, match=r"line 3: the video .*broken.mp4 does not open"):
        open_frames(tmp_path / "broken.mp4", 4, "line 3")


def written(file: Path, pictures: list[bytes], size: tuple[int, int], format: str = "mp4") -> Path:
    """A video of these JPEG files, whose header says that they are of `size`."""
    with av.open(str(file), "w", format=format) as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p"
        for number, picture in enumerate(pictures):
            packet = av.Packet(picture)
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 25), stream, True
            container.mux(packet)
    return file


def jpeg(width: int, height: int) -> bytes:
    found = io.BytesIO()
    Image.new("RGB", (width, height), (200, 90, 30)).save(found, "JPEG")
    return found.getvalue()


def test_a_frame_that_is_not_of_the_size_in_the_header_is_told(tmp_path):
    small, large = jpeg(64, 48), jpeg(2000, 1500)
    assert len(open_frames(written(tmp_path / "good.mp4", [small] * 3, (64, 48)), 8, "here")) == 3
    with pytest.raises(UserError, match="64x48 and holds one of 2000x1500"):
        open_frames(written(tmp_path / "grows.mp4", [small, large, small], (64, 48)), 2, "here")


@pytest.mark.parametrize("named", ["fifo", "good.mp4", "list.mp4", "/etc/passwd"])
def test_a_video_that_names_other_files_is_no_video(tmp_path, named):
    """FFmpeg goes by the contents: such a list made it wait for a pipe, or read any other file."""
    os.mkfifo(tmp_path / "fifo")
    written(tmp_path / "good.mp4", [jpeg(64, 48)], (64, 48))
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {named}\n")
    with pytest.raises(UserError, match="does not open"):
        open_frames(tmp_path / "list.mp4", 4, "here")


def test_a_bare_stream_without_times_has_frames(tmp_path):
    file = tmp_path / "bare.h264"
    with av.open(str(file), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * number, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert len(open_frames(file, 4, "here")) == 4


def test_rows_with_videos(tmp_path):
    grey_frames(tmp_path / "clip", 3)
    messages = [
        {"role": "user", "content": [{"type": "video", "video": "clip"}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "Grey."},
    ]
    rows = [{"video": "clip", "question": "What?", "answer": "Grey."}, {"messages": messages}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, chats = read_samples(tmp_path / "rows.jsonl")
    for chat in chats:
        assert chat.media() == (False, True)
        assert len(replace(chat, frames=2).opened().videos()[0].frames) == 2
    with pytest.raises(UserError, match="has images"):
        calibration_batches(text_model(tmp_path), str(tmp_path / "rows.jsonl"), 2, 8, 0, 1)


def text_model(folder: Path) -> Path:
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=1).save_pretrained(folder / "text")
    return folder / "text"


def test_kinds_of_samples_are_mixed(video_model, tmp_path):
    grey_frames(tmp_path / "clip", 9)
    Image.new("RGB", (64, 48), (9, 200, 0)).save(tmp_path / "a.png")
    rows = [
        {"video": "clip", "question": "what?", "answer": "grey"},
        {"image": "a.png", "question": "what?", "answer": "green"},
        {"question": "a", "answer": "b"},
        {"text": "hello world " * 20},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    batches = calibration_batches(video_model, str(file), 4, 16, 0, 2, Visual(frames=4))
    kinds = sorted(tuple(name for name in batch if name.startswith("pixel")) for batch in batches)
    assert kinds == [(), (), ("pixel_values",), ("pixel_values_videos",)]
    (clip,) = (batch for batch in batches if "pixel_values_videos" in batch)
    assert clip["pixel_values_videos"].shape == (1, 4, 3, 32, 32)
    assert all(isinstance(value, torch.Tensor) for batch in batches for value in batch.values())
    with pytest.raises(UserError, match=r"line [12] .*more than --visual-tokens 10"):
        calibration_batches(video_model, str(file), 4, 16, 0, 2, Visual(frames=4, tokens=10))
