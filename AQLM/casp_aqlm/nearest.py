"""The sum of codewords nearest to a vector: the innermost problem of additive quantization.

One codebook is searched whole. Of several, two at a time are searched exactly where the table of their inner products
fits a cache, the others standing; larger ones by a beam, then one at a time. Distances are Euclidean: the caller brings
targets and codewords into the metric that counts.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from casp.kernels import has_operator, operators
from casp.threads import over_rows
from casp_aqlm.loops import LANES, nearest_entries, nearest_pairs

EXACT_PAIRS = 512  # entries up to which two codebooks are searched together
BEAM = 8  # first codewords that are followed up where the codebooks are larger
_TURNS = 2  # rounds over the codebooks where there are more than can be searched together
_TOGETHER = 1 << 22  # distances that the plain search holds at once
_NATIVE = "aqlm_nearest_pairs"  # of quiptools, which has it for multiples of so many entries:
_NATIVE_ENTRIES = 16


def entries_reference(targets: Tensor, codebook: Tensor) -> Tensor:
    """Code (rows,) int64 of the entry of `codebook` (n, g) nearest to each of `targets` (rows, g)."""
    norms = codebook.square().sum(1)
    parts = targets.split(max(_TOGETHER // len(codebook), 1))
    return torch.cat([torch.addmm(norms, part, codebook.T, alpha=-2).argmin(1) for part in parts])


def pairs_reference(targets: Tensor, codebooks: Tensor) -> Tensor:
    """Codes (rows, 2) int64 of the sum of an entry of each of two codebooks (2, n, g) nearest to each target."""
    size = codebooks.shape[1]
    codes = entries_reference(targets, (codebooks[0][:, None] + codebooks[1]).flatten(0, 1))
    return torch.stack([codes // size, codes % size], 1)


def _padded(tensor: Tensor) -> Tensor:
    """Vectors (..., g) float32 with zeros up to a multiple of 4 coordinates, as the compiled loops take them."""
    return F.pad(tensor.float(), (0, -tensor.shape[-1] % 4)).contiguous()


def entries_compiled(targets: Tensor, codebook: Tensor) -> Tensor:
    """As `entries_reference`, on the CPU."""
    vectors, entries = _padded(targets).numpy(), _padded(codebook)
    blocks = entries.view(-1, min(LANES, len(entries)), entries.shape[1])
    norms, blocks = blocks.square().sum(-1).numpy(), blocks.transpose(1, 2).contiguous().numpy()
    codes = np.empty(len(vectors), np.int64)
    over_rows(lambda at: nearest_entries(vectors[at], blocks, norms, codes[at]), len(vectors))
    return torch.from_numpy(codes)


def pairs_compiled(targets: Tensor, codebooks: Tensor) -> Tensor:
    """As `pairs_reference`, on the CPU, for a multiple of 4 entries."""
    if codebooks.shape[1] % _NATIVE_ENTRIES == 0 and has_operator(_NATIVE, "cpu"):
        return getattr(operators(), _NATIVE)(targets.float(), codebooks.float())
    return pairs_by_numba(targets, codebooks)


def pairs_by_numba(targets: Tensor, codebooks: Tensor) -> Tensor:
    """As `pairs_compiled`, where quiptools is not built."""
    vectors, entries = _padded(targets).numpy(), _padded(codebooks)
    norms, products = entries.square().sum(-1).numpy(), (2 * entries[0] @ entries[1].T).contiguous().numpy()
    columns = entries.transpose(1, 2).contiguous().numpy()
    codes = np.empty((len(vectors), 2), np.int64)
    over_rows(lambda at: nearest_pairs(vectors[at], columns, norms, products, codes[at]), len(vectors))
    return torch.from_numpy(codes)


@dataclass(frozen=True)
class Search:
    """Which loops do the work, and whether codebooks are searched `jointly` or one after the other, as AQLM does."""

    compiled: bool = True
    jointly: bool = True

    def entries(self, targets: Tensor, codebook: Tensor) -> Tensor:
        """Codes of the nearest entries."""
        compiled = self.compiled and targets.device.type == "cpu"
        return (entries_compiled if compiled else entries_reference)(targets, codebook)

    def pairs(self, targets: Tensor, codebooks: Tensor) -> Tensor:
        """Codes of the nearest sums of two entries; of those a beam finds, where codebooks are large."""
        size = codebooks.shape[1]
        if size > EXACT_PAIRS:
            return self._beam(targets, codebooks)
        compiled = self.compiled and targets.device.type == "cpu" and size % 4 == 0
        return (pairs_compiled if compiled else pairs_reference)(targets, codebooks)

    def _beam(self, targets: Tensor, codebooks: Tensor) -> Tensor:
        """Codes (rows, 2) of the best sums that begin with one of the `BEAM` entries nearest to each target."""
        first, second = codebooks
        norms = first.square().sum(1)
        parts = targets.split(max(_TOGETHER // len(first), 1))
        starts = torch.cat([torch.addmm(norms, p, first.T, alpha=-2).topk(BEAM, largest=False)[1] for p in parts])
        left = targets[:, None] - first[starts]
        ends = self.entries(left.flatten(0, 1), second).view(starts.shape)
        best = (left - second[ends]).square().sum(-1).argmin(1, keepdim=True)
        return torch.cat([starts.gather(1, best), ends.gather(1, best)], 1)

    def sums(self, targets: Tensor, codebooks: Tensor, codes: Tensor | None = None) -> Tensor:
        """Codes (rows, M) int64 of the sum of codewords of `codebooks` (M, n, g) nearest to each target (rows, g).

        codes: a sum to start from, without which one is built up codebook after codebook. Exact for one codebook, and
        jointly for two small ones.
        """
        count = len(codebooks)
        if count == 1:
            return self.entries(targets, codebooks[0])[:, None]
        if count == 2 and self.jointly:
            return self.pairs(targets, codebooks)
        codes, left = self._start(targets, codebooks) if codes is None else (codes.clone(), None)
        if left is None:
            left = targets - sum(codebook[code] for codebook, code in zip(codebooks, codes.T, strict=True))
        small = codebooks.shape[1] <= EXACT_PAIRS
        for _ in range(_TURNS if self.jointly else 1):
            for places in combinations(range(count), 2) if self.jointly and small else zip(range(count)):
                for place in places:
                    left = left + codebooks[place][codes[:, place]]
                chosen = codebooks[list(places)]
                found = self.pairs(left, chosen) if len(places) == 2 else self.entries(left, chosen[0])[:, None]
                codes[:, list(places)] = found
                for place in places:
                    left = left - codebooks[place][codes[:, place]]
        return codes

    def _start(self, targets: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
        """Codes built up two codebooks at a time (one, where that is how they are searched), and what they leave."""
        step = 2 if self.jointly else 1
        codes, left = [], targets
        for first in range(0, len(codebooks), step):
            chosen = codebooks[first : first + step]
            found = self.pairs(left, chosen) if len(chosen) == 2 else self.entries(left, chosen[0])[:, None]
            codes.append(found)
            left = left - sum(codebook[code] for codebook, code in zip(chosen, found.T, strict=True))
        return torch.cat(codes, 1), left


JOINT = Search()
"""Compiled where it can be, codebooks together: the default."""
