"""Moments of the inputs of a block's linears, from running it forward."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from casp.model.attention import AttentionCall
from casp.model.inputs import BatchInputs
from casp.moments.density import AttentionDensity
from casp.moments.influence import BlockInfluence
from casp.moments.pool import top_up
from casp.moments.second_moment import SecondMoment, Summands, absorb_all
from casp.moments.statistics import Key, Statistics
from casp.moments.weights import checked_attention
from casp.ranks import Message
from casp.walk import Visit, shared_inputs


class InputStatistics(Statistics):
    """What a block's forward passes tell, added up batch by batch.

    paths: of the block's linears, relative to it; weightings: of "none" and "attention", those wanted;
    density_batches: how many batches the attention's density is measured on; device: of the
    moments; moment: what products are added to, a `SecondMoment`, or `Summands` for batches that are added elsewhere.

    groups: paths of linears that share an input, in the order of computation; moments: of each group's input, by the
    group's first path and the weighting; tokens: how many entered, padding left out.
    """

    def __init__(
        self,
        paths: Iterable[str],
        weightings: Iterable[str],
        density_batches: int,
        device: torch.device | str = "cpu",
        moment: Callable[[int, torch.device], SecondMoment | Summands] = SecondMoment,
    ) -> None:
        self.paths, self.weightings, self.density_batches = list(paths), tuple(weightings), density_batches
        self._moment, self._device = moment, torch.device(device)
        self.groups: list[list[str]] = []
        self.sizes: dict[str, int] = {}
        self.moments: dict[str, dict[str, SecondMoment | Summands]] = {}
        self.tokens, self.batches = 0, 0
        self.influence, self.density = BlockInfluence(), AttentionDensity()

    def run(self, visit: Visit) -> None:
        """One forward pass over the visit's cached inputs, which become what the block puts out."""
        entered: dict[str, tuple[Tensor, BatchInputs]] = {}
        received: list[Tensor] = []

        def attend(call: AttentionCall, batch: BatchInputs) -> None:
            if "attention" in self.weightings:
                received[:] = [checked_attention(call, batch.tokens, visit.index)]
            if self.batches < self.density_batches:
                self.density.add(call, batch)

        def leave(hidden: Tensor, left: Tensor, batch: BatchInputs) -> None:
            if not self.groups:
                inputs = {path: x for path, (x, _) in entered.items()}
                groups = shared_inputs(inputs, self.paths, visit.index)
                self._begin(groups, {group[0]: inputs[group[0]].shape[-1] for group in groups})
            for path, by_weighting in self.moments.items():
                x, seen = entered[path]
                weights = seen.of_rows(received[0])[seen.tokens] if received else None
                for name, moment in by_weighting.items():
                    moment.add(x[seen.tokens], weights if name == "attention" else None)
            self.influence.add(hidden, left, batch.tokens)
            self.tokens += int(batch.tokens.sum())
            self.batches += 1
            entered.clear()
            received.clear()

        observers = {path: lambda x, seen, path=path: entered.update({path: (x, seen)}) for path in self.paths}
        visit.replay(observers, attention=attend, output=leave, advance=True)

    def moments_by_key(self) -> dict[Key, SecondMoment | Summands]:
        """All moments, by the first path of a group and the weighting."""
        return {(path, name): moment for path, named in self.moments.items() for name, moment in named.items()}

    def told(self) -> tuple[dict[str, Any], Iterable[Tensor]]:
        """What is known besides the moments."""
        header = {
            "tokens": self.tokens,
            "batches": self.batches,
            "influence": self.influence.state(),
            "density": self.density.state(),
            "groups": self.groups,
            "sizes": self.sizes,
        }
        return header, ()

    def hear(self, told: dict[str, Any], tensors: Iterator[Tensor]) -> None:
        """Add what another one tells, which has the same groups."""
        self.tokens += told["tokens"]
        self.batches += told["batches"]
        self.influence.absorb(told["influence"])
        self.density.absorb(told["density"])
        if not self.groups:
            self._begin(told["groups"], told["sizes"])

    def _begin(self, groups: list[list[str]], sizes: Mapping[str, int]) -> None:
        self.groups, self.sizes = groups, dict(sizes)
        self.moments = {
            path: {name: self._moment(size, self._device) for name in self.weightings} for path, size in sizes.items()
        }

    def top_up(self, index: int) -> None:
        """After all batches: experts of block `index` that saw few tokens borrow (`casp.moments.pool`)."""
        for name in self.weightings:
            top_up({path: by_weighting[name] for path, by_weighting in self.moments.items()}, f"block {index}")


def token_weights(visit: Visit, weighting: str) -> list[Tensor] | None:
    """The weights "none" or "attention" of all tokens that the block sees, (batch, tokens) for each batch.

    None where all count the same, and so they do in a block without attention.
    """
    if weighting == "none":
        return None
    weights: list[Tensor] = []
    visit.replay(attention=lambda call, batch: weights.append(checked_attention(call, batch.tokens, visit.index)))
    return weights or None


def block_moments(visit: Visit, groups: list[list[str]], weights: list[Tensor] | None = None) -> list[Tensor]:
    """The second moment of each group's shared input, (in, in), over all tokens that are not padding.

    Of the block as it is now; dtype as `SecondMoment.value`. weights: of the tokens, (batch, tokens) for each batch.
    Ranks that visit it together share out the batches, and all of them get the moments.
    """
    sizes = [visit.block.get_submodule(group[0]).in_features for group in groups]

    def see(number: int, one: Visit, moments: Sequence[SecondMoment | Summands]) -> None:
        of_batch = None if weights is None else weights[number // visit.ranks.size]

        def observer(moment: SecondMoment | Summands) -> Callable[[Tensor, BatchInputs], None]:
            def add(x: Tensor, batch: BatchInputs) -> None:
                moment.add(x[batch.tokens], None if of_batch is None else batch.of_rows(of_batch)[batch.tokens])

            return add

        one.replay({group[0]: observer(moment) for group, moment in zip(groups, moments, strict=True)})

    moments, found = added_up(visit, sizes, see), None
    if moments is not None:
        named = {group[0]: moment for group, moment in zip(groups, moments, strict=True)}
        top_up(named, f"block {visit.index}")
        found = Message(None, [moment.checked(f"block {visit.index}, {path}") for path, moment in named.items()])
    return [moment.to(visit.device) for moment in visit.ranks.everywhere(found).tensors]


def added_up(
    visit: Visit, sizes: Sequence[int], see: Callable[[int, Visit, Sequence[SecondMoment | Summands]], None]
) -> list[SecondMoment] | None:
    """Moments of these sizes over all batches of the ranks that visit a block: on rank 0, None elsewhere.

    see(number, one, moments): replay `one`, which has batch `number` alone, and add what it tells.
    """
    ranks = visit.ranks

    def alone(number: int) -> Visit:
        return replace(visit, inputs=[visit.inputs[number // ranks.size]])

    def away(number: int) -> Message:
        kept = [Summands(size, visit.device) for size in sizes]
        see(number, alone(number), kept)
        return Message([one.counts for one in kept], (product for one in kept for product in one.products))

    def absorb(message: Message) -> None:
        products = iter(message.tensors)
        for moment, counts in zip(moments, message.header, strict=True):
            absorb_all(moment, counts, products)

    moments = [SecondMoment(size, visit.device) for size in sizes]
    batches = sum(ranks.gathered(len(visit.inputs)))
    ranks.in_order(range(batches), lambda number: see(number, alone(number), moments), away, absorb)
    return moments if ranks.first else None
