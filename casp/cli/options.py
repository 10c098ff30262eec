"""What a run is asked to do, as frozen values; what decides a run's bytes stands in the union of their records.

Each of these is made from flags at the door of a command (`casp.cli.flags`, or the command's own module) and handed on
alone: nothing behind the door knows of a command line. A run's fingerprint holds `union(...)` of their records, so a
setting cannot be used and left out of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from casp.data import calibration_batches, sources
from casp.model.modality import Visual
from casp.run.digest import file_digest, hash_of


class Search(Protocol):
    """A backend's knobs of the search, a frozen dataclass of its own package."""

    def record(self) -> dict[str, Any]:
        """The knobs by the names under which `Backend.quantize` takes them, JSON-able."""


@dataclass(frozen=True)
class Calibration:
    """What data a stage looks at: a set or mixture by name, how many samples, how long, how many at once."""

    dataset: str = "demo"
    samples: int = 128
    sequence_length: int = 512
    batch_size: int = 8
    visual: Visual = field(default_factory=Visual)

    def batches(self, folder: Path, seed: int) -> list[dict[str, Tensor]]:
        """The batches for the checkpoint in `folder`, see `calibration_batches`."""
        sizes = (self.samples, self.sequence_length, seed, self.batch_size)
        return calibration_batches(folder, self.dataset, *sizes, self.visual)

    def files(self) -> list[Path]:
        """The local files among the data, which no output may touch."""
        return sources.files(self.dataset)

    def contents(self) -> dict[str, str]:
        """A digest of the local files among the data, under the name `files`; empty where there are none."""
        digests = {str(number): file_digest(file) for number, file in enumerate(self.files())}
        return {"files": hash_of(digests)} if digests else {}

    def record(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {
            "dataset": self.dataset,
            "samples": self.samples,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "frames": self.visual.frames,
            "visual_tokens": self.visual.tokens,
        }


@dataclass(frozen=True)
class Compute:
    """Where and in what numbers a stage computes, and the seed of everything random in it.

    dtype None: float32 on a CPU, where half precision is slow, else the model's own, which `of` decides.
    """

    device: torch.device
    dtype: torch.dtype | None
    seed: int = 0

    def of(self, own: torch.dtype) -> "Compute":
        """The same with the dtype decided for a model stored in `own`."""
        if self.dtype is not None:
            return self
        return replace(self, dtype=torch.float32 if self.device.type == "cpu" else own)

    def record(self) -> dict[str, Any]:
        """All of it, JSON-able; devices of one kind give the same bytes."""
        if self.dtype is None:
            raise ValueError("the dtype of a Compute that is recorded must be decided, by `of`")
        return {"dtype": str(self.dtype).removeprefix("torch."), "device": self.device.type, "seed": self.seed}


@dataclass(frozen=True)
class Budget:
    """The bytes that all linears of a decoder may take together; None: as many as the formats asked for take."""

    bytes: int | None

    def record(self) -> dict[str, Any]:
        """It, JSON-able."""
        return {"byte_budget": self.bytes}


def union(*records: Mapping[str, Any]) -> dict[str, Any]:
    """All records in one; ValueError where two of them say different things under one name."""
    whole: dict[str, Any] = {}
    for record in records:
        for name, value in record.items():
            if name in whole and whole[name] != value:
                raise ValueError(f"two settings of a run are called {name}: {whole[name]} and {value}")
            whole[name] = value
    return whole
