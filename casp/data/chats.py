"""Texts and chats with pictures, as the rows of a .jsonl file hold them.

A row is one of
    {"text": "..."}
    {"question": "...", "answer": "...", "image": "a.png" or "images": ["a.png", "b.png"] or "video": "a.mp4",
     "kind": "..."}
    {"messages": [{"role": "user", "content": "..." or [{"type": "image", "image": "a.png"},
                                                        {"type": "text", "text": "..."}]}, ...], "kind": "..."}
with paths relative to the file. A video is a file or a folder of frames; in messages {"type": "video", "video": "..."}.
Pictures, video and "kind" (what reports group questions by) may be left out. Kinds of rows may be mixed in one file.
"messages" is the form of transformers' chat templates.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from casp.errors import UserError
from casp.model.modality import Visual
from casp.reading.pictures import MOST_TOGETHER, open_picture
from casp.reading.texts import read_rows, string_of
from casp.reading.video import open_frames

ROLES = ("system", "user", "assistant")
MOST_SHOWN = 256  # pictures and videos of a chat: a processor needs tens of seconds for thousands
OTHER_MEDIA = ("audio", "audios")
NAMED_MEDIA = ("image", "images", "video", "videos")


@dataclass(frozen=True)
class Video:
    """A video: where it lies, or, once opened, its frames, RGB and of one size."""

    frames: Path | tuple[Image.Image, ...]

    def array(self) -> np.ndarray:
        """The frames of an opened video as processors take them, (frames, height, width, 3) uint8."""
        return np.stack([np.asarray(frame) for frame in self.frames])


Part = str | Path | Image.Image | Video
"""What a turn is made of: text, a video, or a picture, which is a path until `Chat.opened`."""


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: str
    parts: tuple[Part, ...]

    def text(self) -> str:
        """The text of the turn, without its pictures and videos."""
        return "\n".join(part for part in self.parts if isinstance(part, str))

    def pictures(self) -> list[Path | Image.Image]:
        """The pictures of the turn, in order."""
        return [part for part in self.parts if not isinstance(part, str | Video)]

    def videos(self) -> list[Video]:
        """The videos of the turn, in order."""
        return [part for part in self.parts if isinstance(part, Video)]


@dataclass(frozen=True)
class Chat:
    """A conversation; `source` says in error messages where it came from, `kind` groups questions in reports.

    frames: how many of each video are looked at. Chats of a file keep the paths of what they show: whoever runs a
    model on some opens those, for the pictures of all would fill the memory.
    """

    turns: tuple[Turn, ...]
    source: str
    kind: str = "question"
    frames: int = Visual.frames

    @classmethod
    def about(
        cls,
        pictures: Sequence[Path | Image.Image | Video],
        question: str,
        answer: str,
        source: str,
        kind: str = "question",
    ) -> "Chat":
        """One question about pictures and videos (or none) and its answer."""
        return cls((Turn("user", (*pictures, question)), Turn("assistant", (answer,))), source, kind)

    def pictures(self) -> list[Path | Image.Image]:
        """The pictures of all turns, in order."""
        return [picture for turn in self.turns for picture in turn.pictures()]

    def videos(self) -> list[Video]:
        """The videos of all turns, in order."""
        return [video for turn in self.turns for video in turn.videos()]

    def media(self) -> tuple[bool, bool]:
        """Whether it has pictures, and whether it has videos."""
        return bool(self.pictures()), bool(self.videos())

    def asked(self) -> tuple[Turn, ...]:
        """All turns before the answer."""
        return self.turns[:-1]

    def answer(self) -> str:
        """What the assistant says last."""
        return self.turns[-1].text()

    def opened(self) -> "Chat":
        """The same chat with its pictures and the frames of its videos decoded; UserError for what does not open.

        Together they have at most MOST_TOGETHER pixels.
        """
        left = MOST_TOGETHER

        def opened(part: Part) -> Part:
            nonlocal left
            if isinstance(part, Path):
                part = open_picture(part, self.source, left)
                left -= part.width * part.height
            elif isinstance(part, Video) and isinstance(part.frames, Path):
                part = Video(open_frames(part.frames, self.frames, self.source, left))
                left -= sum(frame.width * frame.height for frame in part.frames)
            return part

        return self.mapped(opened)

    def mapped(self, change: Callable[[Part], Part]) -> "Chat":
        """The same chat with every part changed."""
        turns = tuple(replace(turn, parts=tuple(change(part) for part in turn.parts)) for turn in self.turns)
        return replace(self, turns=turns)


def messages(turns: Sequence[Turn], strings: bool) -> list[dict[str, Any]]:
    """Turns, with their pictures open, as `apply_chat_template` takes them.

    strings: with texts for content, as templates of text models want; else with lists of parts, as processors do.
    """
    if strings:
        return [{"role": turn.role, "content": turn.text()} for turn in turns]
    return [{"role": turn.role, "content": [_content(part) for part in turn.parts]} for turn in turns]


def chats_fingerprint(chats: Sequence[Chat]) -> str:
    """SHA-256 over kinds, roles, texts and pixels, one chat opened at a time."""
    digest = hashlib.sha256()
    for chat in (chat.opened() for chat in chats):
        said = [
            [turn.role, [part if isinstance(part, str) else _sizes(part) for part in turn.parts]] for turn in chat.turns
        ]
        digest.update(json.dumps([chat.kind, said]).encode())
        for picture in (*chat.pictures(), *(frame for video in chat.videos() for frame in video.frames)):
            digest.update(picture.convert("RGB").tobytes())
    return digest.hexdigest()


def read_samples(path: Path) -> tuple[list[str], list[Chat]]:
    """The texts and the chats of a .jsonl file, each in their order; every row is checked, no picture opened."""
    texts: list[str] = []
    chats: list[Chat] = []

    def taken(chat: Chat) -> None:
        shown = len(chat.pictures()) + len(chat.videos())
        if shown > MOST_SHOWN:
            raise UserError(f"{chat.source} shows {shown} pictures and videos, at most {MOST_SHOWN}: remove some")
        chats.append(chat)

    for number, row in read_rows(path):
        source = f"line {number} of {path}"
        if any(medium in row for medium in OTHER_MEDIA):
            raise UserError(f"{source} has sound, which is not read: remove it")
        kind = string_of(row, "kind", source) if "kind" in row else "question"
        shown = [name for name in NAMED_MEDIA if name in row]
        if "videos" in row or (shown and ("text" in row or "messages" in row)):
            raise UserError(
                f"{source} names {', '.join(shown)} where that is not read: it is 'image', 'images' or 'video' beside "
                "'question' and 'answer', and a part of a message's content in 'messages'; correct or remove it"
            )
        if "text" in row:
            texts.append(string_of(row, "text", source))
        elif "messages" in row:
            taken(Chat(_turns(row["messages"], path.parent, source), source, kind))
        elif "question" in row and "answer" in row:
            question, answer = string_of(row, "question", source), string_of(row, "answer", source, number_too=True)
            taken(Chat.about(_named_media(row, path.parent, source), question, answer, source, kind))
        else:
            raise UserError(
                f"{source} has none of {{'text'}}, {{'question', 'answer'}} and {{'messages'}}: correct or remove it"
            )
    return texts, chats


def _content(part: Part) -> dict[str, Any]:
    if isinstance(part, Video):
        return {"type": "video", "video": part.array()}
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}


def _sizes(part: Image.Image | Video) -> Any:
    return [frame.size for frame in part.frames] if isinstance(part, Video) else part.size


def _named_media(row: dict[str, Any], folder: Path, source: str) -> list[Path | Video]:
    """The paths in "image", "images" and "video" of a row."""
    names = [string_of(row, "image", source)] if "image" in row else []
    listed = row.get("images", [])
    if not isinstance(listed, list):
        raise UserError(f"{source} has no list as 'images': correct or remove it")
    names += [string_of({"images": name}, "images", source) for name in listed]
    videos = [Video(folder / string_of(row, "video", source))] if "video" in row else []
    return [*(folder / name for name in names), *videos]


def _turns(messages: Any, folder: Path, source: str) -> tuple[Turn, ...]:
    """The turns of a row's "messages", which end with what the model says."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{source} has no list of objects as 'messages': correct or remove it")
    turns = []
    for message in messages:
        if message.get("role") not in ROLES:
            raise UserError(f"{source} has a message whose role is none of {', '.join(ROLES)}: correct or remove it")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if not parts:
            raise UserError(f"{source} has a message that says nothing: add its content or remove it")
        turns.append(Turn(message["role"], tuple(_part(part, folder, source) for part in parts)))
    if not turns or turns[-1].role != "assistant" or not turns[-1].text() or turns[-1].pictures() or turns[-1].videos():
        raise UserError(f"{source} does not end with text of the assistant: add the answer or remove it")
    return tuple(turns)


def _part(part: Any, folder: Path, source: str) -> Part:
    """One part of a message's content."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return string_of(part, "text", source)
    if kind == "image":
        return folder / string_of(part, "image", source)
    if kind == "video":
        return Video(folder / string_of(part, "video", source))
    raise UserError(f"{source} has a part of a message that is neither text, image nor video: correct or remove it")
