"""The block-by-block walk: one block in memory at a time, fed with what the blocks before it produce.

`capture_inputs` runs the model once with its blocks skipped and records what each block is called with;
`walk` then loads the blocks in order, lets a visitor look at and change each, and runs the changed block to
make the inputs of the next.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from casp.attention import AttentionCall, observe_attention
from casp.errors import UserError, told_as
from casp.heap import return_freed_memory
from casp.models import Decoder
from casp.moments.influence import BlockInfluence


@dataclass
class BatchInputs:
    """One calibration batch as the blocks see it.

    hidden: (batch, tokens, hidden), what the next block is fed; kwargs: one dict of keyword arguments per
    block (tensors shared between blocks are shared here); tokens: (batch, tokens) bool, False for padding;
    images: (batch, tokens) bool, True where an image token stands.
    """

    hidden: Tensor
    kwargs: list[dict[str, Any]]
    tokens: Tensor
    images: Tensor


def moved(value: Any, device: torch.device) -> Any:
    """An argument of a block, a tensor or tuples and dicts of them, on `device`."""
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device) for item in value)
    return value


def first_output(output: Any) -> Tensor:
    """The hidden states that a block returns, alone or first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def require_finite(hidden: Tensor, tokens: Tensor, name: str) -> None:
    """UserError where `hidden` (batch, tokens, hidden), what `name` put out, is not finite at one of `tokens`, bool."""
    if not torch.isfinite(hidden[tokens]).all():
        raise UserError(
            f"{name} puts out NaN or infinity; check the model's weights and the calibration data, or run in a wider "
            "--dtype."
        )


class _Recorder:
    """Stands in for the blocks' forward: notes the arguments and returns the hidden states unchanged."""

    def __init__(self, depth: int) -> None:
        self.hidden: Tensor | None = None
        self.kwargs: list[dict[str, Any]] = [{} for _ in range(depth)]
        self._last: Tensor | None = None

    def block(self, index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args:
                raise UserError("the model passes positional arguments to its blocks, which CASP cannot replay.")
            if index == 0:
                self.hidden = hidden_states
            elif hidden_states is not self._last:
                raise UserError(
                    f"the model changes the hidden states between block {index - 1} and block {index}; "
                    "architectures that do so are not supported."
                )
            cache = {"past_key_values": None, "use_cache": False}
            self.kwargs[index] = {key: cache.get(key, value) for key, value in kwargs.items()}
            self._last = hidden_states
            return hidden_states

        return forward


@torch.no_grad()
def capture_inputs(
    decoder: Decoder, batches: list[dict[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> list[BatchInputs]:
    """Run embeddings (and vision tower) over `batches` and record what the blocks would be called with.

    Loads everything outside the blocks, and forgets it again. Hidden states are kept on the CPU in `dtype`.
    """
    model = decoder.model
    decoder.load_rest(device, dtype)
    recorded: list[BatchInputs] = []
    try:
        for batch in batches:
            recorder = _Recorder(len(decoder.blocks))
            for index, block in enumerate(decoder.block_list):
                block.forward = recorder.block(index)
            given = {
                key: value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
                for key, value in batch.items()
            }
            with told_as(
                f"the model in {decoder.folder} cannot take its calibration batches",
                "its config, processor and weights do not belong together, download it again",
            ):
                model.base_model(**given, use_cache=False)
            ids = batch["input_ids"]
            mask = batch.get("attention_mask")
            tokens = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            require_finite(recorder.hidden.cpu(), tokens, f"what comes before the blocks of {decoder.folder}")
            recorded.append(
                BatchInputs(
                    hidden=recorder.hidden.cpu(),
                    kwargs=[moved(kwargs, torch.device("cpu")) for kwargs in recorder.kwargs],
                    tokens=tokens,
                    images=ids == (-1 if decoder.image_token_id is None else decoder.image_token_id),
                )
            )
    finally:
        for block in decoder.block_list:
            block.__dict__.pop("forward", None)
        decoder.unload_rest()
    return recorded


class _Enough(Exception):
    """Ends a replay early: everything that was asked for has been seen."""


@dataclass
class Visit:
    """One block, loaded, with its cached inputs."""

    index: int
    block: nn.Module
    linears: Mapping[str, str]
    inputs: list[BatchInputs]
    device: torch.device

    @torch.no_grad()
    def replay(
        self,
        inputs: Mapping[str, Callable[[Tensor, BatchInputs], None]] | None = None,
        attention: Callable[[AttentionCall, BatchInputs], None] | None = None,
        output: Callable[[Tensor, Tensor, BatchInputs], None] | None = None,
        first: int | None = None,
        advance: bool = False,
    ) -> None:
        """Run the block, as it is now, over its cached inputs, and show what was asked for.

        inputs: module path relative to the block -> called with that module's input (batch, tokens, width);
        attention: called with the operands of the block's attention; output: called with the hidden states
        that enter and leave the block; first: only so many batches; advance: what leaves becomes the cached input.
        The masks in the BatchInputs passed along are on the walk's device. A replay that only asks for
        inputs, or only for the attention, stops each batch as soon as it has seen them.
        """
        wanted = dict(inputs or {})

        def attend(call: AttentionCall, here: BatchInputs) -> None:
            attention(call, here)
            if not wanted and output is None and not advance:
                raise _Enough

        for batch in self.inputs[:first]:
            here = BatchInputs(
                batch.hidden.to(self.device), [], batch.tokens.to(self.device), batch.images.to(self.device)
            )
            waiting = set(wanted)

            def see(path: str, x: Tensor, here: BatchInputs = here, waiting: set[str] = waiting) -> None:
                wanted[path](x, here)
                waiting.discard(path)
                if not waiting and output is None and not advance:
                    raise _Enough

            with ExitStack() as stack:
                for path in wanted:
                    hook = self.block.get_submodule(path).register_forward_pre_hook(
                        lambda module, args, path=path: see(path, args[0])
                    )
                    stack.callback(hook.remove)
                if attention is not None:
                    stack.enter_context(observe_attention(self.block, lambda call, here=here: attend(call, here)))
                try:
                    left = first_output(self.block(here.hidden, **moved(batch.kwargs[self.index], self.device)))
                except _Enough:
                    continue
            if output is not None:
                output(here.hidden, left, here)
            if advance:
                require_finite(left, here.tokens, f"block {self.index}")
                batch.hidden = left.cpu()

    def input_groups(self, paths: list[str]) -> list[list[str]]:
        """`paths` (relative to the block) grouped by the input they share, see `shared_inputs`."""
        entered: dict[str, Tensor] = {}
        self.replay({path: lambda x, _, path=path: entered.setdefault(path, x) for path in paths}, first=1)
        return shared_inputs(entered, paths, self.index)

    def advance(self) -> None:
        """Replace the cached inputs by the outputs of the block as it is now."""
        self.replay(advance=True)

    def block_influence(self) -> float:
        """The block influence of the block as it is now, over the cached inputs."""
        influence = BlockInfluence()
        self.replay(output=lambda entered, left, batch: influence.add(entered, left, batch.tokens))
        return influence.value(self.index)


def shared_inputs(entered: Mapping[str, Tensor], paths: Iterable[str], index: int) -> list[list[str]]:
    """`paths` of block `index` grouped by the input they share, in the order of computation.

    entered: path -> its input, in the order in which the modules ran. Modules of one group see one and the same
    tensor, so one second moment serves them all. UserError where a path never ran.
    """
    order: list[tuple[Tensor, list[str]]] = []
    for path, x in entered.items():
        for tensor, group in order:
            if tensor is x:
                group.append(path)
                break
        else:
            order.append((x, [path]))
    unseen = sorted(set(paths) - entered.keys())
    if unseen:
        raise UserError(f"block {index} never runs {unseen[0]}; such blocks are not supported.")
    return [group for _, group in order]


def walk(
    decoder: Decoder,
    inputs: list[BatchInputs],
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[int], bool] = lambda index: True,
) -> Iterator[Visit]:
    """Visit the blocks in order: each is loaded, yielded, run to make the next block's inputs, forgotten.

    A visitor changes the block in place between two yields. `advance(index)` False leaves the inputs alone.
    `inputs` is consumed: at the end it holds the last block's outputs.
    """
    last = len(decoder.blocks) - 1
    for index in range(last + 1):
        block = decoder.load_block(index, device, dtype)
        visit = Visit(index, block, decoder.linears(index), inputs, device)
        yield visit
        if index < last and advance(index):
            visit.advance()
        decoder.unload_block(index)
        return_freed_memory()
