"""Collecting moments: once forward through the blocks, then once backward, with one block in memory.

Several ranks share out the batches, and the moments: what a batch adds to one travels to the rank that adds that one up
(`casp.moments.statistics`). The states of a batch are written and read by the rank whose it is.

Every block's inputs are kept on disk, a file a batch in the compute dtype, until the backward pass has been there:
samples x tokens x hidden size x bytes of the dtype for each block. The gradient that comes out of a block at its
inputs goes to disk likewise. So a run killed in either pass goes on from the block that it was at, to the same bytes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from casp.errors import UserError
from casp.heap import return_freed_memory
from casp.lowrank import LOW_RANK_ROLES
from casp.model.capture import capture_inputs
from casp.model.decoder import Decoder
from casp.model.inputs import BatchInputs
from casp.moments.backward import NO_LABEL, GradientStatistics, head_gradient, next_tokens
from casp.moments.density import density_batches
from casp.moments.forward import InputStatistics
from casp.moments.second_moment import SecondMoment, Summands
from casp.moments.store import gradients_file, inputs_file, write_gradients, write_inputs
from casp.moments.weights import by_gradient
from casp.ranks import Ranks
from casp.reading.documents import read_json
from casp.run.files import write_json, write_shard
from casp.run.folder import WORK_PREFIX, WorkFolder
from casp.run.progress import counted
from casp.walk import Visit

Statistics = TypeVar("Statistics", InputStatistics, GradientStatistics)
_LOSS_FILE = f"{WORK_PREFIX}loss.json"


class States:
    """One tensor for every batch at every boundary between blocks, on disk; boundary `index` is block `index`'s input.

    kind: what the files are called after, "inputs" or "gradient".
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder, self._kind = folder, kind

    def _file(self, index: int, batch: int) -> Path:
        return self._folder / f"{WORK_PREFIX}{self._kind}-{index:05d}-{batch:05d}.safetensors"

    def write(self, index: int, batch: int, state: Tensor) -> None:
        """Keep a tensor (batch, tokens, hidden)."""
        write_shard(self._file(index, batch), {self._kind: state})

    def read(self, index: int, batch: int) -> Tensor:
        """The tensor, on the CPU; UserError where it is not there any more."""
        file = self._file(index, batch)
        try:
            with safe_open(file, "pt") as stored:
                return stored.get_tensor(self._kind)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is missing or damaged; collect the moments to another --output.") from error

    def remove(self, index: int) -> None:
        """Forget boundary `index`."""
        for file in self._folder.glob(self._file(index, 0).name.replace("-00000.", "-*.")):
            file.unlink()


@dataclass(frozen=True)
class Share:
    """This rank's share of `count` batches: `inputs`, what the blocks are fed, by the number of the batch."""

    ranks: Ranks
    count: int
    inputs: dict[int, BatchInputs]

    def added_up(
        self,
        new: Callable[[type[SecondMoment] | type[Summands], int], Statistics],
        see: Callable[[int, Statistics], None],
    ) -> Statistics | None:
        """What all batches tell: on rank 0, None elsewhere.

        new(kind, number): statistics with moments of a kind, to which batch `number` is added first; see(number, to):
        run a batch of this rank and add it `to` those.
        """
        found, ranks = new(SecondMoment, 0), self.ranks
        if ranks.size == 1:
            for number in range(self.count):
                see(number, found)
            return found
        for first in range(0, self.count, ranks.size):
            self._add_round(range(first, min(first + ranks.size, self.count)), new, see, found)
        for message in ranks.at_first(None if ranks.first else found.held()):
            found.absorb(message)
        return found if ranks.first else None

    def _add_round(
        self,
        numbers: range,
        new: Callable[[type[SecondMoment] | type[Summands], int], Statistics],
        see: Callable[[int, Statistics], None],
        found: Statistics,
    ) -> None:
        """Run a batch a rank, all at the same time, then deal out what each adds, in the order of the batches."""
        ranks, parts = self.ranks, None
        own = numbers.start + ranks.rank
        if own in numbers:
            alone = new(Summands, own)
            see(own, alone)
            ranks.did("batches")
            parts = alone.parts(ranks)
        for number in numbers:
            found.absorb(ranks.dealt(parts if number == own else None, number % ranks.size))


def collect(
    decoder: Decoder,
    work: WorkFolder,
    batches: list[dict[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    weightings: list[str],
    gradients: bool,
) -> Path:
    """Collect the moments of all blocks into `work`; what an earlier attempt finished is taken as it is.

    weightings: names of single token weights; gradients: whether to walk backward, which those by gradient need.
    Returns the finished folder.
    """
    depth, ranks = len(decoder.blocks), work.ranks
    forward_left, backward_left = ranks.told(lambda: _left(work, depth, gradients))
    done = 2 * depth - len(forward_left) - len(backward_left) if gradients else depth - len(forward_left)
    if done:
        print(
            f"resuming {work.folder}: {done} of {depth * (2 if gradients else 1)} passes through a block are finished"
        )
    if forward_left or backward_left:
        mine = ranks.mine(len(batches))
        captured = capture_inputs(decoder, [batches[number] for number in mine], device, dtype, ranks.first)
        share = Share(ranks, len(batches), dict(zip(mine, captured, strict=True)))
        states, few = States(work.folder, "inputs"), density_batches(len(batches[0]["input_ids"]))
        for number, batch in share.inputs.items():
            if 0 in forward_left:
                states.write(0, number, batch.hidden)
            batch.hidden = batch.hidden[:, :0]  # from here on a batch's states are on disk
        by_input = [name for name in weightings if not by_gradient(name)]
        _forward(decoder, work, share, states, forward_left, device, dtype, by_input, few, gradients)
        if gradients:
            labels = {
                number: next_tokens(batches[number]["input_ids"], seen.predicting)
                for number, seen in share.inputs.items()
            }
            by_output = [name for name in weightings if by_gradient(name)]
            _backward(decoder, work, share, states, labels, backward_left, device, dtype, by_output)
    made = [inputs_file, gradients_file] if gradients else [inputs_file]
    return work.close([name(index) for name in made for index in range(depth)])


def _left(work: WorkFolder, depth: int, gradients: bool) -> tuple[list[int], list[int]]:
    """The blocks that have not been walked forward yet, and those that are to be walked backward."""
    forward = [index for index in range(depth) if not (work.result / inputs_file(index)).exists()]
    backward = [index for index in range(depth) if not (work.result / gradients_file(index)).exists()]
    return forward, backward if gradients else []


def _forward(
    decoder: Decoder,
    work: WorkFolder,
    share: Share,
    states: States,
    left: list[int],
    device: torch.device,
    dtype: torch.dtype,
    weightings: list[str],
    few: int,
    keep: bool,
) -> None:
    """The blocks `left`, in order: moments of their inputs to disk, and the states they put out.

    few: on how many batches the attention's density is measured; keep: the states, for the way back.
    """
    for index in counted(left, f"{work.stage}, forward"):
        began = time.perf_counter()
        found = _forward_through(decoder, index, share, states, device, dtype, weightings, few)
        decoder.unload_block(index)
        if found is not None:
            found.top_up(index)
            work.check_sources()
            write_inputs(work.result / inputs_file(index), found, index)
            if not keep:
                states.remove(index)
        return_freed_memory()
        work.log(f"block {index} forward in {time.perf_counter() - began:.1f} s")


def _forward_through(
    decoder: Decoder,
    index: int,
    share: Share,
    states: States,
    device: torch.device,
    dtype: torch.dtype,
    weightings: list[str],
    few: int,
) -> InputStatistics | None:
    block, linears = decoder.load_block(index, device, dtype), decoder.linears(index)
    paths = decoder.linears(index, factors=True).values()

    def see(number: int, to: InputStatistics) -> None:
        one = share.inputs[number].with_hidden(states.read(index, number))
        to.run(Visit(index, block, linears, [one], device))
        states.write(index + 1, number, one.hidden)

    return share.added_up(lambda kind, number: InputStatistics(paths, weightings, few - number, device, kind), see)


def _head(
    decoder: Decoder,
    work: WorkFolder,
    share: Share,
    states: States,
    gradients: States,
    labels: dict[int, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[int, float]:
    """The loss's gradient behind the last block, to disk (once a run); number of losses and their sum in nats."""
    record, depth = work.folder / _LOSS_FILE, len(decoder.blocks)
    if not share.ranks.told(record.exists):
        decoder.load_rest(device, dtype)
        mine = []
        for number, of_batch in labels.items():
            gradient, loss = head_gradient(decoder, states.read(depth, number).to(device), of_batch.to(device))
            gradients.write(depth, number, gradient)
            mine.append([int((of_batch != NO_LABEL).sum()), loss])
        decoder.unload_rest()
        return_freed_memory()
        found = share.ranks.by_item(mine)
        if share.ranks.first:
            losses = [count for count, _ in found]
            write_json(record, {"losses": sum(losses), "loss": sum((loss for _, loss in found), 0.0)})
            states.remove(depth)
    known = share.ranks.told(lambda: read_json(record, "the loss"))
    return known["losses"], known["loss"]


def _backward(
    decoder: Decoder,
    work: WorkFolder,
    share: Share,
    states: States,
    labels: dict[int, Tensor],
    left: list[int],
    device: torch.device,
    dtype: torch.dtype,
    weightings: list[str],
) -> None:
    """The blocks `left`, from the last to the first: moments by gradient to disk, and the gradients at their inputs."""
    gradients = States(work.folder, "gradient")
    losses, loss = _head(decoder, work, share, states, gradients, labels, device, dtype)
    if losses == 0:
        raise UserError("the calibration data has no position with a loss (two text tokens in a row); give other data.")
    for index in counted(left[::-1], f"{work.stage}, backward"):
        began = time.perf_counter()
        found = _backward_through(decoder, index, share, states, gradients, device, dtype, weightings)
        decoder.unload_block(index)
        if found is not None:
            found.top_up(index)
            work.check_sources()
            write_gradients(work.result / gradients_file(index), index, found, losses, loss)
            gradients.remove(index + 1)
            states.remove(index)
        return_freed_memory()
        work.log(f"block {index} backward in {time.perf_counter() - began:.1f} s")


def _backward_through(
    decoder: Decoder,
    index: int,
    share: Share,
    states: States,
    gradients: States,
    device: torch.device,
    dtype: torch.dtype,
    weightings: list[str],
) -> GradientStatistics | None:
    block = decoder.load_block(index, device, dtype)
    roles = decoder.linears(index, factors=True)
    linears = {path: block.get_submodule(path) for path in roles.values()}
    covariances = {path for role, path in roles.items() if role in LOW_RANK_ROLES}
    sizes = {path: (linear.out_features, linear.in_features) for path, linear in linears.items()}

    def see(number: int, to: GradientStatistics) -> None:
        one = share.inputs[number].with_hidden(states.read(index, number))
        gradient = to.run(block, index, one, gradients.read(index + 1, number).to(device))
        if index:
            gradients.write(index, number, gradient)

    return share.added_up(lambda kind, number: GradientStatistics(sizes, weightings, covariances, device, kind), see)
