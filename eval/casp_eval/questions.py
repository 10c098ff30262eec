"""Questions about images: perplexity of the answers and exact match, `python -m casp_eval.questions --model ...`.

Perplexity of the answers: exp of the mean negative log-likelihood of the answers' tokens, given image and
question in the model's own chat template (the token that ends the turn is not counted).
Exact match: greedy answers equal to the right one after `normalise`, per kind of question, with the 95% interval
of Wilson (J. Am. Stat. Assoc. 22, 1927), which stays inside [0, 1] and is sound for small samples.
"""

import math
from collections import defaultdict
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from casp.cli import Parser, add_device_arguments, add_frames_argument, model_folder, run_main
from casp.data.chats import Chat
from casp.data.sources import EVALUATION_SCENES, evaluation_chats
from casp.ranks import ALONE, Ranks, here
from casp.reading.config import open_config
from casp_eval.loading import Checkpoint, open_checkpoint, require_images
from casp_eval.options import (
    add_batch_argument,
    add_model_argument,
    add_output_argument,
    add_question_arguments,
    check_output,
    write_figure,
)
from casp_eval.perplexity import perplexity
from casp_eval.scoring import token_losses

Z95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion: (low, high), both in [0, 1]; asked > 0."""
    share = right / asked
    weight = Z95**2 / asked
    centre = (share + weight / 2) / (1 + weight)
    half = Z95 / (1 + weight) * math.sqrt(share * (1 - share) / asked + weight / (4 * asked))
    return max(0.0, centre - half), min(1.0, centre + half)


def normalise(answer: str) -> str:
    """What two answers are compared by: no outer white space, lower case, no final dot."""
    return answer.strip().lower().removesuffix(".").rstrip()


def answer_length(tokenizer: Any, before: str, answer: str) -> int:
    """How many tokens of before + answer belong to the answer.

    A tokenizer may merge the prompt's last characters with the answer's first, so the answer begins where the
    encodings with and without it part. Images do not matter here: they only lengthen both alike.
    """
    whole = tokenizer(before + answer).input_ids
    alone = tokenizer(before).input_ids
    same = next((i for i, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), len(alone))
    return len(whole) - same


def answer_loss(
    checkpoint: Checkpoint, items: list[Chat], batch_size: int, progress: str | None = None, ranks: Ranks = ALONE
) -> tuple[float, int]:
    """Mean negative log-likelihood of the answers' tokens in nats, and how many tokens that were.

    ranks: who share out the batches.
    """
    mine = []
    for batch in tqdm(_batches(items, batch_size, ranks), desc=progress, disable=progress is None, leave=False):
        batch = [item.opened() for item in batch]
        rendered = [checkpoint.prompt(item.asked(), item.answer()) for item in batch]
        inputs = checkpoint.encode(
            [before + answer for before, answer in rendered], _pictures(batch), "right", _videos(batch)
        )
        ids = inputs["input_ids"]
        keep = torch.zeros_like(ids, dtype=torch.bool)
        ends = inputs["attention_mask"].sum(dim=1).tolist()
        for row, (end, (before, answer)) in enumerate(zip(ends, rendered, strict=True)):
            keep[row, end - 1 - answer_length(checkpoint.tokenizer, before, answer) : end - 1] = True
        with checkpoint.running():
            losses = token_losses(checkpoint.model, inputs, ids.roll(-1, dims=1), keep)
        mine.append([losses.double().sum().item(), losses.numel()])
    found = ranks.by_item(mine)
    tokens = sum(count for _, count in found)
    return sum(loss for loss, _ in found) / tokens, tokens


@torch.inference_mode()
def answer_logits(checkpoint: Checkpoint, item: Chat) -> tuple[Tensor, Tensor]:
    """Logits float32 (tokens, vocabulary) from which the tokens of an opened chat's answer follow, and these tokens."""
    before, answer = checkpoint.prompt(item.asked(), item.answer())
    inputs = checkpoint.encode([before + answer], _pictures([item]), "right", _videos([item]))
    length = answer_length(checkpoint.tokenizer, before, answer)
    with checkpoint.running():
        logits = checkpoint.model(**inputs).logits
    return logits[0, -length - 1 : -1].float(), inputs["input_ids"][0, -length:]


def ask(checkpoint: Checkpoint, batch: list[Chat], **settings: Any) -> list[str]:
    """What the model says to each chat of a batch, without special tokens; media are opened and of the same kinds.

    settings: of transformers' `generate`. Every evaluation that asks questions asks them here.
    """
    prompts = [checkpoint.prompt(item.asked())[0] for item in batch]
    inputs = checkpoint.encode(prompts, _pictures(batch), "left", _videos(batch))
    return checkpoint.generated(inputs, **settings)


def answers(
    checkpoint: Checkpoint,
    items: list[Chat],
    batch_size: int,
    max_new_tokens: int,
    progress: str | None = None,
    ranks: Ranks = ALONE,
) -> list[str]:
    """Greedy answers, one an item, decoded without special tokens; `ranks` share out the batches."""
    given = []
    for batch in tqdm(_batches(items, batch_size, ranks), desc=progress, disable=progress is None, leave=False):
        given.append(ask(checkpoint, [item.opened() for item in batch], max_new_tokens=max_new_tokens))
    return [answer for of_batch in ranks.by_item(given) for answer in of_batch]


def accuracy(items: list[Chat], given: list[str]) -> dict[str, Any]:
    """Exact match over all questions and per kind, each with its 95% interval.

    {"accuracy", "interval": [low, high], "questions", "kinds": {kind: {"accuracy", "interval", "questions"}}}
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for item, answer in zip(items, given, strict=True):
        right[item.kind].append(normalise(answer) == normalise(item.answer()))
    kinds = {kind: _share(marks) for kind, marks in sorted(right.items())}
    return {**_share([mark for marks in right.values() for mark in marks]), "kinds": kinds}


def answer_perplexity(
    checkpoint: Checkpoint, items: list[Chat], batch_size: int, progress: str | None = None, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """{"perplexity", "tokens", "questions"}: exp of `answer_loss`."""
    loss, tokens = answer_loss(checkpoint, items, batch_size, progress, ranks)
    return {"perplexity": perplexity(loss, str(checkpoint.folder)), "tokens": tokens, "questions": len(items)}


def _batches(items: list[Chat], size: int, ranks: Ranks) -> list[list[Chat]]:
    """This rank's batches of questions in their order; a processor takes pictures for all of a batch or for none."""
    alike = [list(group) for _, group in groupby(items, key=lambda item: item.media())]
    batches = [group[start : start + size] for group in alike for start in range(0, len(group), size)]
    return [batches[number] for number in ranks.mine(len(batches))]


def _pictures(batch: list[Chat]) -> list[list[Any]] | None:
    """The pictures of each question of a batch, None where there are none."""
    return [item.pictures() for item in batch] if batch[0].pictures() else None


def _videos(batch: list[Chat]) -> list[list[Any]] | None:
    """The videos of each question of a batch, None where there are none."""
    return [item.videos() for item in batch] if batch[0].videos() else None


def _share(marks: list[bool]) -> dict[str, Any]:
    right = sum(marks)
    return {"accuracy": right / len(marks), "interval": list(wilson(right, len(marks))), "questions": len(marks)}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        prog="questions.sh", description="Answers to questions about images: perplexity and exact match, as JSON."
    )
    add_model_argument(parser)
    add_output_argument(parser)
    add_device_arguments(parser)
    parser.add_argument(
        "--dataset",
        default="test",
        help=f"questions: built-in ({', '.join(EVALUATION_SCENES)}) or a .jsonl of image or video, question, answer, "
        "kind (default: %(default)s)",
    )
    add_question_arguments(parser, "--dataset")
    add_batch_argument(parser)
    add_frames_argument(parser)
    options = parser.parse_args(arguments)
    check_output(options.output, options.model, options.dataset)
    items = evaluation_chats(options.dataset, options.questions, options.seed, options.frames)
    folder = model_folder(options.model)
    require_images(folder, open_config(folder))
    checkpoint = open_checkpoint(options.model, options.device, options.dtype)
    ranks = here()
    loss = answer_perplexity(checkpoint, items, options.batch_size, "answers scored", ranks)
    given = answers(checkpoint, items, options.batch_size, options.max_new_tokens, "questions asked", ranks)
    figure = {"model": options.model, "dataset": options.dataset, "perplexity": loss["perplexity"]}
    if ranks.first:
        write_figure({**figure, **accuracy(items, given)}, options.output)


if __name__ == "__main__":
    run_main(main, shared=True)
