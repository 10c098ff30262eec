"""A checkpoint as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), called "casp" there.

lmms-eval finds it through the entry-point group `lmms_eval.models` (see `manifest` in `casp_eval.lmms_eval`):
`python -m lmms_eval --model casp --model_args pretrained=DIR --tasks mme`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from torch.nn import functional
from tqdm import tqdm

from casp.data.chats import Turn
from casp.errors import UserError
from casp_eval.loading import Checkpoint, open_checkpoint
from casp_eval.questions import answer_length

PASSED_ON = ("temperature", "top_p", "num_beams")
"""The tasks' generation settings that transformers' `generate` takes under the same names."""


class CaspModel(lmms):
    """Any checkpoint that our evaluations open, asked in its own chat template; images, no video and no sound."""

    is_simple = True  # lmms-eval hands over question and pictures, not finished messages

    def __init__(
        self, pretrained: str | Checkpoint, batch_size: int | str = 1, device: str = "auto", dtype: str = "auto"
    ) -> None:
        """pretrained: folder, hub id or built-in name, or an open checkpoint; batch_size: questions at a time."""
        super().__init__()
        if isinstance(pretrained, Checkpoint):
            self.checkpoint = pretrained
        else:
            self.checkpoint = open_checkpoint(pretrained, device, dtype)
        self.batch_size = int(batch_size)
        self.device = self.checkpoint.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request, cut before the first of the task's stop words."""
        answers: dict[int, str] = {}
        bar = tqdm(total=len(requests), desc="questions asked")
        for settings, batch in self._batches(requests):
            texts, pictures = [], []
            for index in batch:
                question, _, doc_to_visual, doc_id, task, split = requests[index].args
                pictures.append(self._pictures(doc_to_visual, doc_id, task, split))
                texts.append(self.checkpoint.prompt([Turn("user", (*pictures[-1], question))])[0])
            inputs = self.checkpoint.encode(texts, pictures if any(pictures) else None, "left")
            passed = {name: settings[name] for name in PASSED_ON if settings.get(name) is not None}
            if not passed.get("temperature"):
                passed = {name: value for name, value in passed.items() if name == "num_beams"}
            with torch.inference_mode():
                output = self.checkpoint.model.generate(
                    **inputs,
                    **passed,
                    do_sample="temperature" in passed,
                    max_new_tokens=settings.get("max_new_tokens", 1024),
                )
            new = output[:, inputs["input_ids"].shape[1] :]
            given = self.checkpoint.tokenizer.batch_decode(new, skip_special_tokens=True)
            for index, text in zip(batch, given, strict=True):
                answers[index] = _cut(text, settings.get("until") or [])
            bar.update(len(batch))
        bar.close()
        return [answers[index] for index in range(len(requests))]

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Mean loss in nats of each given answer's tokens, and whether greedy decoding would have given it.

        The loss, not its negative: lmms-eval's multiple choice takes the smallest.
        """
        scores = []
        for request in tqdm(requests, desc="answers scored"):
            question, target, doc_to_visual, doc_id, task, split = request.args
            answer = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            pictures = self._pictures(doc_to_visual, doc_id, task, split)
            before, answer = self.checkpoint.prompt([Turn("user", (*pictures, question))], str(answer).strip())
            inputs = self.checkpoint.encode([before + answer], [pictures] if pictures else None, "right")
            length = answer_length(self.checkpoint.tokenizer, before, answer)
            wanted = inputs["input_ids"][0, -length:]
            logits = self.checkpoint.model(**inputs).logits[0, -length - 1 : -1].float()
            loss = functional.cross_entropy(logits, wanted).item()
            scores.append((loss, torch.equal(logits.argmax(-1), wanted)))
        return scores

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """UserError: a model made here answers one question."""
        raise UserError("tasks of several rounds are not supported; choose tasks of one question each.")

    def _batches(self, requests: list[Instance]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Generation settings and indices of requests that share them and all have pictures or all none."""

        def kind(index: int) -> tuple[str, bool]:
            _, settings, doc_to_visual, doc_id, task, split = requests[index].args
            return repr(sorted(settings.items())), bool(self._pictures(doc_to_visual, doc_id, task, split))

        for _, members in groupby(sorted(range(len(requests)), key=kind), key=kind):
            indices = list(members)
            for start in range(0, len(indices), self.batch_size):
                yield requests[indices[start]].args[1], indices[start : start + self.batch_size]

    def _pictures(self, doc_to_visual: Any, doc_id: int, task: str, split: str) -> list[Image.Image]:
        """The pictures of one document, RGB; UserError for anything but pictures."""
        shown = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        for one in shown:
            if not isinstance(one, Image.Image):
                raise UserError(
                    f"task {task} shows {type(one).__name__}, and only pictures are supported; choose a task on images."
                )
        if shown and not self.checkpoint.is_multimodal:
            raise UserError(
                f"task {task} shows pictures, and {self.checkpoint.folder} is a text-only model; give a multimodal one."
            )
        return [one.convert("RGB") for one in shown]


def _cut(text: str, stops: str | list[str]) -> str:
    """`text` up to the first of the stop words."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text
