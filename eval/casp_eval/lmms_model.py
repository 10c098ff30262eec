"""A checkpoint as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), called "casp" there.

lmms-eval finds it through the entry-point group `lmms_eval.models` (see `manifest` in `casp_eval.lmms_eval`):
`python -m lmms_eval --model casp --model_args pretrained=DIR --tasks mme`. The harness hands over a document in one of
two ways, the question with its pictures and videos ("simple") or finished messages ("chat"); both become one `Chat`,
which is asked as questions.sh asks it.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from casp.data.chats import Chat, Part, Turn, Video
from casp.errors import UserError
from casp.model.modality import Visual
from casp_eval.loading import Checkpoint, open_checkpoint
from casp_eval.questions import answer_logits, ask

PASSED_ON = ("temperature", "top_p", "num_beams")
"""The tasks' generation settings that transformers' `generate` takes under the same names."""
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp"}
SOUNDS = {".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus", ".webm"}
"""Ends of file names by which lmms-eval (`ConfigurableMessagesTask`) tells what a path without a type is."""


class CaspModel(lmms):
    """Any checkpoint that our evaluations open, asked in its own chat template; pictures and videos, no sound."""

    is_simple = True

    def __init__(
        self,
        pretrained: str | Checkpoint,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "auto",
        frames: int | str = Visual.frames,
    ) -> None:
        """pretrained: folder, hub id or built-in name, or an open checkpoint; batch_size: questions at a time; frames:
        of a video, evenly spaced in time.
        """
        super().__init__()
        if isinstance(pretrained, Checkpoint):
            self.checkpoint = pretrained
        else:
            self.checkpoint = open_checkpoint(pretrained, device, dtype)
        self.batch_size = int(batch_size)
        self.frames = int(frames)
        self.device = self.checkpoint.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request, cut before the first of the task's stop words."""
        answers: dict[int, str] = {}
        bar = tqdm(total=len(requests), desc="questions asked")
        for settings, batch in self._batches(requests):
            chats = [replace(self._chat(requests[index]), frames=self.frames).opened() for index in batch]
            passed = {name: settings[name] for name in PASSED_ON if settings.get(name) is not None}
            if not passed.get("temperature"):
                passed = {name: value for name, value in passed.items() if name == "num_beams"}
            given = ask(
                self.checkpoint,
                chats,
                **passed,
                do_sample="temperature" in passed,
                max_new_tokens=settings.get("max_new_tokens", 1024),
            )
            for index, text in zip(batch, given, strict=True):
                answers[index] = _cut(text, settings.get("until") or [])
            bar.update(len(batch))
        bar.close()
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(mean loss in nats of each given answer's tokens, whether greedy decoding would have given it).

        The loss, not its negative: lmms-eval's multiple choice takes the smallest. The pairs come in its wrapper:
        lmms-eval 0.7.3 makes a bare pair that does not begin with a text into one (`unwrap_generation_output`).
        """
        scores = []
        for request in tqdm(requests, desc="answers scored"):
            question, target, doc_to_visual, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            answer = target if isinstance(target, str) else target(document)
            chat = self._about(doc_to_visual(document), question, doc_id, task, str(answer).strip())
            logits, wanted = answer_logits(self.checkpoint, replace(chat, frames=self.frames).opened())
            loss = torch.nn.functional.cross_entropy(logits, wanted).item()
            scores.append(GenerationResult((loss, torch.equal(logits.argmax(-1), wanted))))
        return scores

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """UserError: a model made here answers one question."""
        raise UserError("tasks of several rounds are not supported; choose tasks of one question each.")

    def _settings(self, request: Instance) -> dict[str, Any]:
        """How the task wants answers to be generated."""
        return request.args[1]

    def _chat(self, request: Instance) -> Chat:
        """What a request asks; its media are opened later."""
        question, _, doc_to_visual, doc_id, task, split = request.args
        return self._about(doc_to_visual(self.task_dict[task][split][doc_id]), question, doc_id, task)

    def _about(self, shown: list[Any] | None, question: str, doc_id: int, task: str, answer: str = "") -> Chat:
        source = _source(doc_id, task)
        media = [_medium(*_typed(one), source) for one in shown or []]
        return self._checked(Chat.about(media, question, answer, source))

    def _checked(self, chat: Chat) -> Chat:
        """UserError where a text-only model is shown something."""
        if any(chat.media()) and not self.checkpoint.is_multimodal:
            raise UserError(
                f"{chat.source} shows pictures or a video, and {self.checkpoint.folder} is a text-only model; give a "
                "multimodal one."
            )
        return chat

    def _batches(self, requests: list[Instance]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Generation settings and indices of requests that share them and the kinds of their media."""

        def kind(index: int) -> tuple[str, tuple[bool, bool]]:
            settings = self._settings(requests[index])
            return repr(sorted(settings.items())), self._chat(requests[index]).media()

        for _, members in groupby(sorted(range(len(requests)), key=kind), key=kind):
            indices = list(members)
            for start in range(0, len(indices), self.batch_size):
                yield self._settings(requests[indices[start]]), indices[start : start + self.batch_size]


class CaspChatModel(CaspModel):
    """The same for tasks that hand over messages; they only generate, given answers are not scored this way."""

    is_simple = False

    def _settings(self, request: Instance) -> dict[str, Any]:
        return request.args[2]

    def _chat(self, request: Instance) -> Chat:
        _, doc_to_messages, _, doc_id, task, split = request.args
        source = _source(doc_id, task)
        turns = [
            Turn(message["role"], tuple(_part(content, source) for content in _contents(message)))
            for message in doc_to_messages(self.task_dict[task][split][doc_id])
        ]
        return self._checked(Chat((*turns, Turn("assistant", ("",))), source))


def _source(doc_id: int, task: str) -> str:
    return f"document {doc_id} of task {task}"


def _contents(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _part(content: dict[str, Any], source: str) -> Part:
    """One part of a message in lmms-eval's form."""
    if content["type"] == "text":
        return content["text"]
    return _medium(content["type"], content["url"], source)


def _typed(shown: Any) -> tuple[str, Any]:
    """(type, thing) of what `doc_to_visual` gives, as lmms-eval's own step from there to messages has it."""
    if isinstance(shown, Image.Image):
        return "image", shown
    if isinstance(shown, dict):
        whole = not {"video_start", "video_end"} & set(shown)
        return shown.get("type", "video"), (shown.get("url") or shown.get("path") or shown) if whole else shown
    suffix = Path(shown).suffix.lower() if isinstance(shown, str) else ""
    return "image" if suffix in PICTURES else "audio" if suffix in SOUNDS else "video", shown


def _medium(kind: str, shown: Any, source: str) -> Part:
    """A picture, RGB or its path, or a video's path; UserError for anything else."""
    if kind == "image" and isinstance(shown, Image.Image):
        return shown.convert("RGB")
    if kind in ("image", "video") and isinstance(shown, str):
        return Path(shown) if kind == "image" else Video(Path(shown))
    raise UserError(
        f"{source} shows {kind} as {type(shown).__name__}, and only pictures and whole video files are supported; "
        "choose another task."
    )


def _cut(text: str, stops: str | list[str]) -> str:
    """`text` up to the first of the stop words."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text
