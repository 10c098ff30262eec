"""Collecting moments: once forward through the blocks, then once backward, with one block in memory.

Every block's inputs are kept on disk, a file a batch in the compute dtype, until the backward pass has been there:
samples x tokens x hidden size x bytes of the dtype for each block. The gradient that comes out of a block at its
inputs goes to disk likewise. So a run killed in either pass goes on from the block that it was at, to the same bytes.
"""

import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from casp.errors import UserError
from casp.heap import return_freed_memory
from casp.model.capture import capture_inputs
from casp.model.decoder import Decoder
from casp.model.inputs import BatchInputs
from casp.moments.backward import NO_LABEL, GradientStatistics, head_gradient, next_tokens
from casp.moments.density import density_batches
from casp.moments.forward import InputStatistics
from casp.moments.store import gradients_file, inputs_file, write_gradients, write_inputs
from casp.moments.weights import by_gradient
from casp.reading.documents import read_json
from casp.run.files import write_json, write_shard
from casp.run.folder import WORK_PREFIX, WorkFolder
from casp.run.progress import counted
from casp.walk import Visit

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
    depth = len(decoder.blocks)
    forward_left = [i for i in range(depth) if not (work.result / inputs_file(i)).exists()]
    backward_left = [i for i in range(depth) if gradients and not (work.result / gradients_file(i)).exists()]
    done = 2 * depth - len(forward_left) - len(backward_left) if gradients else depth - len(forward_left)
    if done:
        print(
            f"resuming {work.folder}: {done} of {depth * (2 if gradients else 1)} passes through a block are finished"
        )
    if forward_left or backward_left:
        inputs = capture_inputs(decoder, batches, device, dtype)
        states = States(work.folder, "inputs")
        for number, batch in enumerate(inputs):
            if 0 in forward_left:
                states.write(0, number, batch.hidden)
            batch.hidden = batch.hidden[:, :0]  # from here on a batch's states are on disk
        by_input = [name for name in weightings if not by_gradient(name)]
        _forward(decoder, work, inputs, states, forward_left, device, dtype, by_input, gradients)
        if gradients:
            labels = [
                next_tokens(batch["input_ids"], seen.predicting) for batch, seen in zip(batches, inputs, strict=True)
            ]
            by_output = [name for name in weightings if by_gradient(name)]
            _backward(decoder, work, inputs, states, labels, backward_left, device, dtype, by_output)
    made = [inputs_file, gradients_file] if gradients else [inputs_file]
    return work.close([name(index) for name in made for index in range(depth)])


def _forward(
    decoder: Decoder,
    work: WorkFolder,
    inputs: list[BatchInputs],
    states: States,
    left: list[int],
    device: torch.device,
    dtype: torch.dtype,
    weightings: list[str],
    keep: bool,
) -> None:
    """The blocks `left`, in order: moments of their inputs to disk, and the states they put out."""
    few = density_batches(len(inputs[0].tokens))
    for index in counted(left, f"{work.stage}, forward"):
        began = time.perf_counter()
        block = decoder.load_block(index, device, dtype)
        found = InputStatistics(decoder.linears(index, factors=True).values(), weightings, few)
        for number, batch in enumerate(inputs):
            one = batch.with_hidden(states.read(index, number))
            found.run(Visit(index, block, decoder.linears(index), [one], device))
            states.write(index + 1, number, one.hidden)
        found.top_up(index)
        work.check_sources()
        write_inputs(work.result / inputs_file(index), found, index)
        if not keep:
            states.remove(index)
        decoder.unload_block(index)
        return_freed_memory()
        work.log(f"block {index} forward in {time.perf_counter() - began:.1f} s")


def _head(
    decoder: Decoder,
    work: WorkFolder,
    states: States,
    gradients: States,
    labels: list[Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[int, float]:
    """The loss's gradient behind the last block, to disk (once a run); number of losses and their sum in nats."""
    record, depth = work.folder / _LOSS_FILE, len(decoder.blocks)
    if not record.exists():
        decoder.load_rest(device, dtype)
        total = 0.0
        for number, of_batch in enumerate(labels):
            gradient, loss = head_gradient(decoder, states.read(depth, number).to(device), of_batch.to(device))
            gradients.write(depth, number, gradient)
            total += loss
        decoder.unload_rest()
        return_freed_memory()
        write_json(record, {"losses": sum(int((part != NO_LABEL).sum()) for part in labels), "loss": total})
        states.remove(depth)
    found = read_json(record, "the loss")
    return found["losses"], found["loss"]


def _backward(
    decoder: Decoder,
    work: WorkFolder,
    inputs: list[BatchInputs],
    states: States,
    labels: list[Tensor],
    left: list[int],
    device: torch.device,
    dtype: torch.dtype,
    weightings: list[str],
) -> None:
    """The blocks `left`, from the last to the first: moments by gradient to disk, and the gradients at their inputs."""
    gradients = States(work.folder, "gradient")
    losses, loss = _head(decoder, work, states, gradients, labels, device, dtype)
    if losses == 0:
        raise UserError("the calibration data has no position with a loss (two text tokens in a row); give other data.")
    for index in counted(left[::-1], f"{work.stage}, backward"):
        began = time.perf_counter()
        block = decoder.load_block(index, device, dtype)
        linears = {path: block.get_submodule(path) for path in decoder.linears(index, factors=True).values()}
        sizes = {path: (linear.out_features, linear.in_features) for path, linear in linears.items()}
        found = GradientStatistics(sizes, weightings, device)
        for number, batch in enumerate(inputs):
            one = batch.with_hidden(states.read(index, number))
            gradient = found.run(block, index, one, gradients.read(index + 1, number).to(device))
            if index:
                gradients.write(index, number, gradient)
        found.top_up(index)
        work.check_sources()
        write_gradients(work.result / gradients_file(index), index, found, losses, loss)
        gradients.remove(index + 1)
        states.remove(index)
        decoder.unload_block(index)
        return_freed_memory()
        work.log(f"block {index} backward in {time.perf_counter() - began:.1f} s")
