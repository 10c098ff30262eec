"""Chats as batches: rendered by the model's own template and processor, fitted, and with the answers told apart."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from casp.data.chats import Chat, Part, Video, messages
from casp.errors import UserError, told_as
from casp.model.batch import Batch
from casp.model.modality import Visual, is_multimodal, visual_tokens
from casp.reading.pretrained import open_processor, open_tokenizer, require_video


def chat_batches(
    chats: list[Chat], folder: Path, config: Any, batch_size: int, visual: Visual, rng: random.Random
) -> list[Batch]:
    """Chats of like length together, so that little is padding; the batches in random order."""
    multimodal = is_multimodal(config)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    renderer = open_processor(folder) if multimodal else open_tokenizer(folder)
    tokenizer = renderer.tokenizer if multimodal else renderer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    # Which frames are seen has been settled already; processors would pick some by a rate of their own.
    settled = {"videos_kwargs": {"do_sample_frames": False}}

    def render(part: list[Chat], waiting: bool = False) -> dict[str, Tensor]:
        videos = any(chat.videos() for chat in part)
        options = {"padding": True, **(settled if videos else {})}
        batch = renderer.apply_chat_template(
            [messages(chat.turns, strings=not multimodal) for chat in part],
            add_generation_prompt=waiting,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **({"processor_kwargs": options} if multimodal else options),
        )
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}

    # Rendering each chat alone first gives its exact length (how many tokens a picture takes may depend on its
    # size) and lets an error name its row, at the price of preparing each picture several times. It is
    # opened twice as well: only the pictures of one batch are in memory.
    answers: list[Tensor] = []
    scalings: list[list[float]] = []
    for chat in chats:
        shown = chat.opened()
        if multimodal and chat.videos():
            require_video(renderer, folder, chat.source)
        with told_as(
            f"the processor of {folder} cannot take {chat.source}", "use the original model's processor files"
        ):
            scaling, ids = _fitted(shown, lambda one: render([one])["input_ids"], config, visual.tokens)
            fitted = _rescaled(shown, scaling)
            answers.append(_answers(fitted, ids[0], lambda one, waiting: render([one], waiting)["input_ids"][0]))
        scalings.append(scaling)
        if positions is not None and ids.shape[1] > positions:
            raise UserError(
                f"{chat.source} makes {ids.shape[1]} tokens, more than the model's {positions} positions:"
                " shorten or remove it"
            )
    batches = []
    # A processor takes pictures for all chats of a batch or for none, and so with videos.
    for media in sorted({chat.media() for chat in chats}, reverse=True):
        alike = [number for number, chat in enumerate(chats) if chat.media() == media]
        alike.sort(key=lambda number: len(answers[number]))
        for start in range(0, len(alike), batch_size):
            part = alike[start : start + batch_size]
            rendered = render([_rescaled(chats[number].opened(), scalings[number]) for number in part])
            said = pad_sequence([answers[number] for number in part], batch_first=True)
            batches.append(Batch.of_chats(rendered, said))
    rng.shuffle(batches)
    return batches


def _answers(chat: Chat, ids: Tensor, ids_of: Callable[[Chat, bool], Tensor]) -> Tensor:
    """(tokens,) bool: where the assistant speaks among the tokens `ids` of `chat`.

    ids_of: the ids of a chat, and whether it waits for the assistant. Templates do not tell; but a turn of the
    assistant begins where the chat that waits for it parts from the whole one, and ends where the one that has it does.
    """
    found = torch.zeros(len(ids), dtype=torch.bool)
    for number, turn in enumerate(chat.turns):
        if turn.role == "assistant":
            before = replace(chat, turns=chat.turns[:number])
            through = replace(chat, turns=chat.turns[: number + 1])
            start = _in_common(ids, ids_of(before, True)) if number else 0
            last = number + 1 == len(chat.turns)
            found[start : len(ids) if last else _in_common(ids, ids_of(through, False))] = True
    return found


def _in_common(one: Tensor, other: Tensor) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    return int((one[:length] == other[:length]).cumprod(0).sum())


def _fitted(chat: Chat, ids_of: Callable[[Chat], Tensor], config: Any, most: int) -> tuple[list[float], Tensor]:
    """The shares by which an opened chat's pictures and frames are scaled, one after the other, until they take at
    most `most` tokens, and its token ids then.

    UserError where that does not help: the model gives every picture so many tokens, whatever its size.
    """
    ids = ids_of(chat)
    taken = first = _visual_count(ids, config)
    shares: list[float] = []
    for _ in range(_SCALINGS):
        if taken <= most:
            return shares, ids
        shares.append(0.95 * (most / taken) ** 0.5)
        chat = _rescaled(chat, shares[-1:])
        ids = ids_of(chat)
        taken = _visual_count(ids, config)
    if taken <= most:
        return shares, ids
    raise UserError(
        f"{chat.source} makes {first} visual tokens, more than --visual-tokens {most}, and {taken} scaled down: use "
        "fewer pictures or --frames, or allow more"
    )


_SCALINGS = 4  # processors round sizes to their patches: once is not always enough


def _visual_count(ids: Tensor, config: Any) -> int:
    return sum(int(found.sum()) for found in visual_tokens(ids, config).values())


def _rescaled(chat: Chat, shares: list[float]) -> Chat:
    """An opened chat with its pictures and frames scaled by each of `shares`, one after the other."""
    for share in shares:
        chat = chat.mapped(lambda part, share=share: _scaled(part, share))
    return chat


def _scaled(part: Part, share: float) -> Part:
    if isinstance(part, Video):
        return Video(tuple(_scaled(frame, share) for frame in part.frames))
    if isinstance(part, str):
        return part
    return part.resize([max(1, round(side * share)) for side in part.size])
