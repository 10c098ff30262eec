"""Calibration batches of text or of image and text, the same for the same seed.

A batch is a dict of CPU tensors that `model(**batch)` takes (`casp.model.batch`). Text batches are windows of exactly
`sequence_length` tokens, without padding and without special tokens. Batches of chats hold one chat
per sample (pictures, videos, question, answer), padded on the right within a batch; a chat keeps its own length,
since cutting it would cut image tokens.
"""

import hashlib
import random
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from casp.data import mixture
from casp.data.chat_batches import chat_batches
from casp.data.chats import Chat
from casp.data.sources import BUILT_IN_CHATS, draw
from casp.errors import UserError
from casp.model.batch import Batch, answers_of
from casp.model.modality import Visual, cross_attends, is_multimodal
from casp.reading.config import open_config
from casp.reading.pretrained import check_ids, open_tokenizer

DEFAULT_VISUAL = Visual()


def calibration_batches(
    folder: Path,
    dataset: str,
    samples: int,
    sequence_length: int,
    seed: int,
    batch_size: int,
    visual: Visual = DEFAULT_VISUAL,
) -> list[Batch]:
    """Batches of `samples` sequences for the checkpoint in `folder`, on the CPU.

    `dataset` is rp, c4, wikitext2 or ptb (hub); a local .txt or .jsonl file; a built-in set (`sources.BUILT_IN`);
    or a mixture of these, "NAME:SHARE,NAME:SHARE" (`mixture.shares`). A model that reads pictures by cross-attention
    takes of a built-in mixture the chats alone, which is printed. Chats and texts together give batches of chats
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
    shares = mixture.shares(dataset, multimodal)
    if dataset in mixture.STANDS_FOR and cross_attends(config) and (of_chats := shares.keys() & BUILT_IN_CHATS.keys()):
        print(f"blocks of the model in {folder} read pictures alone: calibrated on {', '.join(of_chats)}, without text")
        shares = {name: Fraction(1, len(of_chats)) for name in of_chats}
    parts = mixture.counts(shares, samples)
    if left_out := [name for name in shares if name not in parts]:
        print(f"{samples} samples are too few for all of {dataset}: none of {', '.join(left_out)}", file=sys.stderr)
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
    of_texts = [Batch(input_ids=ids, attention_mask=torch.ones_like(ids)) for ids in texts]
    of_chats = chat_batches(chats, folder, config, batch_size, visual, rng) if chats else []
    batches = mixture.interleaved(of_chats, of_texts)
    for batch in batches:
        check_ids(batch["input_ids"], config, folder)
    return batches


def fingerprint(batches: list[dict[str, Tensor]]) -> str:
    """SHA-256 over the names, types, shapes and bytes of all tensors, in order."""
    digest = hashlib.sha256()
    for number, batch in enumerate(batches):
        answers = answers_of(batch)
        for name, tensor in sorted({**batch, **({} if answers is None else {"answers": answers})}.items()):
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
            " --sequence-length, or give --dataset a longer text (demo-speeches is the longest built in)"
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
