"""Closed walks through the trellis: what they stand for, and the nearest one, in plain PyTorch.

The search is Viterbi's, tail-biting as in arXiv 2406.11235, section 3.3: the sequence is solved once around its own
beginning, with free ends; the bits that this walk carries over the beginning then bind both ends of a second search.
This is the reference of the compiled search in quiptools, and what runs on other devices.
"""

import torch
from torch import Tensor

_SETTLED = 16  # lives of a state after which a walk no longer depends on where it began


def walk_states(symbols: Tensor, bits: int, states: int) -> Tensor:
    """The states of closed walks, (T, n) int64, from the bits that each step stores, `symbols` (T, n) uint8."""
    # Bytes drop what is beyond 8 bits by themselves.
    kept = symbols if states == 8 else symbols.to(torch.int32)
    found = kept.clone()
    for i in range(1, -(-states // bits)):
        found |= kept.roll(-i, 0) << (bits * i)
    return found.long() & ((1 << states) - 1)


def _search(x: Tensor, values: Tensor, bits: int, begin: Tensor, end: Tensor | None) -> tuple[Tensor, Tensor]:
    """The nearest walks to x (T, n) from the overlaps that `begin` allows to the overlap `end`.

    begin: (n, U) cost of each overlap before the first step, U = 2^(states - bits); end: (n,) overlap after the last
    step, None for the cheapest. Returns states (T, n) and the cost (n,).
    """
    overlaps, branches = begin.shape[1], 1 << bits
    best, choices = begin, []
    for value in x:
        costs = best.repeat(1, branches) + (value[:, None] - values).square()
        best, choice = costs.view(len(value), overlaps, branches).min(2)
        choices.append(choice)
    overlap = best.argmin(1) if end is None else end
    cost = best.gather(1, overlap[:, None])[:, 0]
    states = torch.empty(x.shape, dtype=torch.int64, device=x.device)
    for t in range(len(x) - 1, -1, -1):
        states[t] = overlap << bits | choices[t].gather(1, overlap[:, None])[:, 0]
        overlap = states[t] & (overlaps - 1)
    return states, cost


def _bound(overlap: Tensor, overlaps: int) -> Tensor:
    costs = torch.full((len(overlap), overlaps), torch.finfo(torch.float32).max / 2, device=overlap.device)
    return costs.scatter_(1, overlap[:, None], 0.0)


def nearest_walks(x: Tensor, values: Tensor, bits: int) -> Tensor:
    """What each step of the closed walk nearest to each sequence of x (T, n) float32 stores: (T, n) uint8.

    values: (2^states) float32, what a state stands for. Within a fraction of a percent of the optimum, and the optimum
    itself for sequences of fewer than two states' bits.
    """
    length, count = x.shape
    states = (len(values) - 1).bit_length()
    overlaps = 1 << (states - bits)
    if length * bits < 2 * states:
        every = torch.arange(overlaps, device=x.device).repeat(count)
        many, costs = _search(x.repeat_interleave(overlaps, 1), values, bits, _bound(every, overlaps), every)
        cheapest = costs.view(count, overlaps).argmin(1) + torch.arange(count, device=x.device) * overlaps
        walk = many[:, cheapest]
    else:
        half = min(length // 2, _SETTLED * -(-states // bits))
        around = torch.cat([x[length - half :], x[:half]])
        passing, _ = _search(around, values, bits, torch.zeros(count, overlaps, device=x.device), None)
        overlap = passing[half] & (overlaps - 1)
        walk, _ = _search(x, values, bits, _bound(overlap, overlaps), overlap)
    return (walk & ((1 << bits) - 1)).to(torch.uint8)
