"""Calibration batches of text or of image and text, the same for the same seed.

A batch is a dict of CPU tensors that `model(**batch)` takes. Text batches are windows of exactly
`sequence_length` tokens, without padding and without special tokens. Batches of chats hold one chat
per sample (pictures, videos, question, answer), padded on the right within a batch; a chat keeps its own length,
since cutting it would cut image tokens.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from casp.data import mixture
from casp.data.chats import Chat, Part, Video, messages
from casp.data.sources import draw
from casp.errors import UserError, told_as
from casp.model.modality import Visual, is_multimodal, visual_tokens
from casp.reading.config import open_config
from casp.reading.pretrained import check_ids, open_processor, open_tokenizer, require_video

DEFAULT_VISUAL = Visual()


def calibration_batches(
    folder: Path,
    dataset: str,
    samples: int,
    sequence_length: int,
    seed: int,
    batch_size: int,
    visual: Visual = DEFAULT_VISUAL,
) -> list[dict[str, Tensor]]:
    """Batches of `samples` sequences for the checkpoint in `folder`, on the CPU.

    `dataset` is rp, c4, wikitext2 or ptb (hub); a local .txt or .jsonl file; a built-in set (`sources.BUILT_IN`);
    or a mixture of these, "NAME:SHARE,NAME:SHARE" (`mixture.shares`). Chats and texts together give batches of chats
    and batches of text, evenly spread. `chats` says what the rows of a .jsonl may be.
    """
    sizes = {"samples": samples, "sequence length": sequence_length, "batch size": batch_size}
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    folder = Path(folder)
    config = open_config(folder)
    multimodal = is_multimodal(config)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        raise UserError(
            f"a sequence length of {sequence_length} is more than the {positions} positions of the model in"
            f" {folder}: lower --sequence-length"
        )
    rng = random.Random(seed)
    chats: list[Chat] = []
    windows: list[Tensor] = []
    parts = mixture.counts(mixture.shares(dataset, multimodal), samples)
    for name, count in parts.items():
        drawn = draw(name, count, rng, visual.frames)
        if not multimodal and any(any(chat.media()) for chat in drawn.chats):
            raise UserError(f"{name} has images, but {folder} is a text model: use a text set")
        chats += drawn.chats
        if drawn.windows:
            cut = _windows_of_text if isinstance(drawn.text, str) else _windows_of_documents
            windows += cut(drawn.text, name, open_tokenizer(folder), drawn.windows, sequence_length, rng)
    if len(parts) > 1:
        rng.shuffle(windows)
    texts = [torch.stack(windows[start : start + batch_size]) for start in range(0, len(windows), batch_size)]
    text_batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts]
    chat_batches = _chat_batches(chats, folder, config, batch_size, visual, rng) if chats else []
    batches = mixture.interleaved(chat_batches, text_batches)
    for batch in batches:
        check_ids(batch["input_ids"], config, folder)
    return batches


def fingerprint(batches: list[dict[str, Tensor]]) -> str:
    """SHA-256 over the names, types, shapes and bytes of all tensors, in order."""
    digest = hashlib.sha256()
    for number, batch in enumerate(batches):
        for name, tensor in sorted(batch.items()):
            digest.update(f"{number} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _windows_of_text(
    text: str, dataset: str, tokenizer: Any, samples: int, length: int, rng: random.Random
) -> list[Tensor]:
    """Windows at random places of one text, none overlapping another, in random order."""
    ids = _tokens(tokenizer, text)
    spare = len(ids) - samples * length
    if spare < 0:
        raise UserError(
            f"{dataset} has {len(ids)} tokens, fewer than {samples} samples of {length}: lower --samples or"
            " --sequence-length, or use a longer text"
        )
    # Sorted shifts of a row of windows that touch: every place is reached and none overlap.
    shifts = sorted(rng.choices(range(spare + 1), k=samples))
    windows = [ids[shift + i * length : shift + (i + 1) * length] for i, shift in enumerate(shifts)]
    rng.shuffle(windows)
    return windows


def _windows_of_documents(
    documents: Iterator[str], dataset: str, tokenizer: Any, samples: int, length: int, rng: random.Random
) -> list[Tensor]:
    """One window at a random place of each document that is long enough (the protocol of GPTQ and QuIP#)."""
    windows: list[Tensor] = []
    for document in documents:
        spare = len(document) - 16 * length
        if spare > 0:  # a whole book would take seconds to tokenize
            start = rng.randrange(spare + 1)
            document = document[start : start + 16 * length]
        ids = _tokens(tokenizer, document)
        if len(ids) >= length:
            start = rng.randrange(len(ids) - length + 1)
            windows.append(ids[start : start + length])
        if len(windows) == samples:
            return windows
    raise UserError(
        f"{dataset} has only {len(windows)} documents of at least {length} tokens: lower --samples or --sequence-length"
    )


def _tokens(tokenizer: Any, text: str) -> Tensor:
    # verbose=False: a text longer than the model's context is no mistake here.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _chat_batches(
    chats: list[Chat], folder: Path, config: Any, batch_size: int, visual: Visual, rng: random.Random
) -> list[dict[str, Tensor]]:
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

    def render(part: list[Chat]) -> dict[str, Tensor]:
        videos = any(chat.videos() for chat in part)
        options = {"padding": True, **(settled if videos else {})}
        batch = renderer.apply_chat_template(
            [messages(chat.turns, strings=not multimodal) for chat in part],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **({"processor_kwargs": options} if multimodal else options),
        )
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}

    # Rendering each chat alone first gives its exact length (how many tokens a picture takes may depend on its
    # size) and lets an error name its row, at the price of preparing each picture twice. It is opened twice as well:
    # only the pictures of one batch are in memory.
    lengths: list[int] = []
    scalings: list[list[float]] = []
    for chat in chats:
        shown = chat.opened()
        if multimodal and chat.videos():
            require_video(renderer, folder, chat.source)
        with told_as(
            f"the processor of {folder} cannot take {chat.source}", "use the original model's processor files"
        ):
            scaling, ids = _fitted(shown, lambda one: render([one])["input_ids"], config, visual.tokens)
        scalings.append(scaling)
        lengths.append(ids.shape[1])
        if positions is not None and lengths[-1] > positions:
            raise UserError(
                f"{chat.source} makes {lengths[-1]} tokens, more than the model's {positions} positions:"
                " shorten or remove it"
            )
    batches = []
    # A processor takes pictures for all chats of a batch or for none, and so with videos.
    for media in sorted({chat.media() for chat in chats}, reverse=True):
        alike = [number for number, chat in enumerate(chats) if chat.media() == media]
        alike.sort(key=lambda number: lengths[number])
        for start in range(0, len(alike), batch_size):
            part = alike[start : start + batch_size]
            batches.append(render([_rescaled(chats[number].opened(), scalings[number]) for number in part]))
    rng.shuffle(batches)
    return batches


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
