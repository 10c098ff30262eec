"""Calibration batches as the tests of data draw and read them."""

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
)

from casp.data import calibration_batches


def batches(folder: Path, dataset: object, samples=8, sequence_length=32, seed=0, batch_size=3):
    """`calibration_batches` with small defaults."""
    return calibration_batches(folder, str(dataset), samples, sequence_length, seed, batch_size)


def decoded(folder: Path, found: list[dict[str, torch.Tensor]]) -> list[str]:
    """The text of every sample."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.decode(ids) for batch in found for ids in batch["input_ids"]]


def rows_of(found: list[dict[str, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, mask) of every sample."""
    return [pair for batch in found for pair in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
