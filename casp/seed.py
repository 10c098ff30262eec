"""Seeds that depend on what they are for, not on what was done before."""

import hashlib

import torch


def matrix_generator(seed: int, path: str) -> torch.Generator:
    """The generator of one matrix: it depends on the seed and the path, not on what was done before."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
