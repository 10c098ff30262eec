"""The block-by-block walk: one block in memory at a time, fed with what the blocks before it produce.

`casp.model.capture` runs the model once with its blocks passed over and records what each block is called with; `walk`
then loads the blocks in order, lets a visitor look at and change each, and runs the changed block to make the inputs of
the next.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from casp.errors import UserError
from casp.heap import return_freed_memory
from casp.model.attention import AttentionCall, observe_attention
from casp.model.decoder import Decoder
from casp.model.inputs import BatchInputs, first_output, moved, require_finite
from casp.model.split import every_expert, expert_of
from casp.moments.influence import BlockInfluence
from casp.ranks import ALONE, Ranks


class _Enough(Exception):
    """Ends a replay early: everything that was asked for has been seen."""


@dataclass
class Visit:
    """One block, loaded, with its cached inputs.

    ranks: who visit it together, each with inputs of its own batches, as `Ranks.mine` shares them out.
    """

    index: int
    block: nn.Module
    linears: Mapping[str, str]
    inputs: list[BatchInputs]
    device: torch.device
    ranks: Ranks = ALONE

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

        inputs: module path relative to the block -> called with that module's input (batch, tokens, width), or as it
        sees the batch (`BatchInputs.seen_by`), which is passed along; attention: called with the operands of the
        block's attention, if it has one; output: called with the hidden states
        that enter and leave the block; first: only so many batches; advance: what leaves becomes the cached input.
        The masks in the BatchInputs passed along are on the walk's device. A replay that only asks for
        inputs, or only for the attention, stops each batch as soon as it has seen them.
        """
        wanted = dict(inputs or {})
        experts = {path: expert_of(self.block, path) for path in wanted}

        def attend(call: AttentionCall, here: BatchInputs) -> None:
            attention(call, here)
            if not wanted and output is None and not advance:
                raise _Enough

        for batch in self.inputs[:first]:
            here, hidden = batch.without_hidden(self.device), batch.hidden.to(self.device)
            waiting = set(wanted)

            def see(path: str, x: Tensor, here: BatchInputs = here, waiting: set[str] = waiting) -> None:
                wanted[path](x, here.seen_by(x, experts[path]))
                waiting.discard(path)
                if not waiting and output is None and not advance:
                    raise _Enough

            with ExitStack() as stack:
                stack.enter_context(every_expert(self.block))
                for path in wanted:
                    hook = self.block.get_submodule(path).register_forward_pre_hook(
                        lambda module, args, path=path: see(path, args[0])
                    )
                    stack.callback(hook.remove)
                if attention is not None:
                    stack.enter_context(observe_attention(self.block, lambda call, here=here: attend(call, here)))
                try:
                    left = first_output(self.block(hidden, **moved(batch.kwargs[self.index], self.device)))
                except _Enough:
                    continue
            if output is not None:
                output(hidden, left, here)
            if advance:
                require_finite(left, here.tokens, f"block {self.index}")
                batch.hidden = batch.entering(self.index + 1, left.cpu())

    def input_groups(self, paths: list[str]) -> list[list[str]]:
        """`paths` (relative to the block) grouped by the input they share, see `shared_inputs`."""
        entered: dict[str, Tensor] = {}
        self.replay({path: lambda x, _, path=path: entered.setdefault(path, x) for path in paths}, first=1)
        return shared_inputs(entered, paths, self.index)

    def advance(self) -> None:
        """Replace the cached inputs by the outputs of the block as it is now."""
        self.replay(advance=True)

    def block_influence(self, attention: Callable[[AttentionCall, BatchInputs], None] | None = None) -> float:
        """The block influence of the block as it is now, over the cached inputs of all ranks that visit it.

        attention: shown the operands of this rank's attention on the way, as by `replay`.
        """
        found: list[list[float]] = []

        def see(entered: Tensor, left: Tensor, batch: BatchInputs) -> None:
            of_batch = BlockInfluence()
            of_batch.add(entered, left, batch.tokens)
            found.append(of_batch.state())

        self.replay(output=see, attention=attention)
        influence = BlockInfluence()
        for state in self.ranks.by_item(found):
            influence.absorb(state)
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
    only: Iterable[int] | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[Visit]:
    """Visit the blocks in order: each is loaded, yielded, run to make the next block's inputs, forgotten.

    A visitor changes the block in place between two yields. `advance(index)` False leaves the inputs alone.
    `inputs` is consumed: at the end it holds the last block's outputs. only: the blocks to visit, all by default; some
    of them where there are no inputs. ranks: who do so together, see `Visit`.
    """
    last = len(decoder.blocks) - 1
    for index in range(last + 1) if only is None else only:
        block = decoder.load_block(index, device, dtype)
        visit = Visit(index, block, decoder.linears(index), inputs, device, ranks)
        yield visit
        if index < last and advance(index):
            visit.advance()
        decoder.unload_block(index)
        return_freed_memory()
