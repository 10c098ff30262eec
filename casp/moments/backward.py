"""Moments of the loss's gradient at the outputs of a block's linears, from running it backward.

The loss is that of the next token, summed over the positions that have one. Walked from the last block to the first,
each block is run once more from its stored inputs, with gradients: so one block and one batch's activations are in
memory, and the outcome is that of backpropagation through the whole model.

With g the gradient at a linear's output y = W x, an error D of W costs, to second order and with the Fisher information
in place of the Hessian, ``1/2 E[(g^T D x)^2]`` a token; with x and g independent ``1/2 tr(G D H D^T)``, G = E[g g^T]
(YAQA, arXiv 2505.22988), and with rows of D alike ``tr(D H_g D^T) / (2 out)``, H_g = E[|g|^2 x x^T].
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from casp.model.decoder import Decoder
from casp.model.head import POSITIONS, head_logits
from casp.model.inputs import BatchInputs, first_output, moved
from casp.model.split import every_expert, expert_of
from casp.moments.pool import top_up
from casp.moments.second_moment import SecondMoment, Summands
from casp.moments.statistics import Key, Statistics
from casp.moments.weights import gradient_weights, tempered, typical_energy

NO_LABEL = -100
OUTPUTS = "outputs"
"""The moment of the gradient at a linear's output."""
STATES = ("cross_attention_states",)
"""Arguments of a block whose rows some of its linears read in the place of the sequence's: those have gradients too."""
SUREST = 0.9
"""Probability of a label above which a position is taken to be less sure than it is."""
_HOTTEST, _HALVINGS = 64.0, 14  # the temperature is found to a part in 4,000


def next_tokens(ids: Tensor, predicting: Tensor) -> Tensor:
    """What each position should predict, (batch, tokens) int64; NO_LABEL where it has no loss.

    ids: token ids; predicting: where there is a loss (`casp.model.batch.predicting`); both (batch, tokens).
    """
    return torch.where(predicting, ids.roll(-1, 1), NO_LABEL)


def head_gradient(decoder: Decoder, hidden: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """The gradient of the summed loss at the last block's outputs, and that loss in nats.

    hidden: (batch, tokens, hidden), what the last block puts out, on the device where everything outside the blocks is
    loaded; labels: (batch, tokens), see `next_tokens`. The gradient has the shape and dtype of `hidden`; at the logits
    it is `softmax(logits / temperature)` less the label, with the `temperatures` of positions that are too sure. The
    loss told is that of the model as it is.
    """
    gradient, total = torch.zeros_like(hidden), 0.0
    places = (labels != NO_LABEL).nonzero()
    for part in places.split(POSITIONS) if len(places) else ():
        rows, columns = part.unbind(1)
        with torch.enable_grad():
            leaf = hidden[rows, columns].detach().requires_grad_()
            logits, wanted = head_logits(decoder, leaf).float(), labels[rows, columns]
            heat = temperatures(logits.detach(), wanted)
            softened = heat * F.cross_entropy(logits / heat[:, None], wanted, reduction="none")
            (found,) = torch.autograd.grad(softened.sum(), leaf)
        gradient[rows, columns] = found
        total += F.cross_entropy(logits.detach(), wanted, reduction="sum").item()
    return gradient, total


def temperatures(logits: Tensor, labels: Tensor) -> Tensor:
    """(positions,): 1 where the label has a probability of at most SUREST, else the temperature that gives it that.

    logits: (positions, vocabulary); labels: (positions,). A model that is sure has next to no gradient and seems to
    bear anything, while errors as large as those of two bits make it err: noise on the logits flattens a distribution
    about as a temperature does (MacKay 1992, "The evidence framework applied to classification networks").
    """

    def too_sure(heat: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits / heat[:, None]).softmax(-1).gather(1, labels[:, None])[:, 0] > SUREST

    found = torch.ones_like(logits[:, 0])
    rows = too_sure(found, logits, labels)
    logits, labels = logits[rows], labels[rows]
    least, most = torch.ones_like(logits[:, 0]), torch.full_like(logits[:, 0], _HOTTEST)
    for _ in range(_HALVINGS):
        middle = (least * most).sqrt()
        above = too_sure(middle, logits, labels)
        least, most = torch.where(above, middle, least), torch.where(above, most, middle)
    found[rows] = most
    return found


class GradientStatistics(Statistics):
    """What a block's backward passes tell, added up batch by batch.

    sizes: path of each linear, relative to the block -> (out_features, in_features); weightings: of "gradient" and
    "gradient-norm", those wanted; covariances: paths whose gradients' second moment is wanted beside their energy;
    moment: as in `casp.moments.forward.InputStatistics`.

    inputs: of each linear's input, by path and weighting; outputs: of the gradient at the outputs of `covariances`,
    every sequence at a mean square of 1 (`casp.moments.weights.tempered`); tokens: how many entered, padding left out.
    The gradient is that of the loss summed over all positions, in nats.
    """

    def __init__(
        self,
        sizes: dict[str, tuple[int, int]],
        weightings: Iterable[str],
        covariances: Collection[str],
        device: torch.device | str = "cpu",
        moment: Callable[[int, torch.device | str], SecondMoment | Summands] = SecondMoment,
    ) -> None:
        names = tuple(weightings)
        self.inputs = {path: {name: moment(size[1], device) for name in names} for path, size in sizes.items()}
        self.outputs = {path: moment(size[0], device) for path, size in sizes.items() if path in covariances}
        self._energies: dict[str, list[Tensor]] = {path: [] for path in sizes}
        self._counts: dict[str, list[Tensor]] = {path: [] for path in sizes}
        self._chats: dict[str, list[Tensor]] = {path: [] for path in sizes}
        self.tokens = 0

    def run(self, block: nn.Module, index: int, batch: BatchInputs, gradient: Tensor) -> Tensor:
        """One batch backward through block `index`: the gradient at its inputs, (batch, tokens, hidden).

        gradient: of the loss at the block's outputs; batch: what the block was fed, on the gradient's device.
        """
        device = gradient.device
        here = batch.without_hidden(device)
        experts = {path: expert_of(block, path) for path in self.inputs}

        def watch(path: str, x: Tensor, output: Tensor) -> None:
            seen = here.seen_by(x, experts[path])
            if output.requires_grad:  # an expert that no token goes to has no gradient either
                x = x.detach()
                output.register_hook(lambda g: self._add(path, x, g, seen, batch))

        with ExitStack() as stack:
            stack.enter_context(every_expert(block))
            for path in self.inputs:
                hook = block.get_submodule(path).register_forward_hook(
                    lambda module, args, output, path=path: watch(path, args[0], output)
                )
                stack.callback(hook.remove)
            with torch.enable_grad():
                entered = batch.hidden.detach().to(device).requires_grad_()
                given = moved(batch.kwargs[index], device)
                beside = {name: given[name].detach().requires_grad_() for name in STATES if given.get(name) is not None}
                left = first_output(block(entered, **given | beside))
                found, *_ = torch.autograd.grad(left, [entered, *beside.values()], gradient, allow_unused=True)
        self.tokens += int(here.tokens.sum())
        return found

    @torch.no_grad()
    def _add(self, path: str, x: Tensor, gradient: Tensor, seen: BatchInputs, batch: BatchInputs) -> None:
        x, tokens = seen.by_sequence(x, *batch.tokens.shape)
        gradient, _ = seen.by_sequence(gradient, *batch.tokens.shape)
        for name, moment in self.inputs[path].items():
            moment.add(x[tokens], gradient_weights(name, gradient, tokens)[tokens])
        scaled, energies = tempered(gradient, tokens)
        if path in self.outputs:
            self.outputs[path].add(scaled[tokens & (energies > 0)[:, None]])
        self._energies[path].append(energies.cpu())
        self._counts[path].append(tokens.sum(-1).cpu())
        self._chats[path].append(torch.full(energies.shape, batch.answers is not None))

    def moments_by_key(self) -> dict[Key, SecondMoment | Summands]:
        """All moments, by path and weighting, and by path and OUTPUTS."""
        found: dict[Key, SecondMoment | Summands] = {}
        for path, of_input in self.inputs.items():
            found |= {(path, name): moment for name, moment in of_input.items()}
            if path in self.outputs:
                found[path, OUTPUTS] = self.outputs[path]
        return found

    def told(self) -> tuple[dict[str, Any], Iterable[Tensor]]:
        """How many tokens there were, and of each linear its sequences' energies, tokens and kinds."""
        sequences = {path: len(parts) for path, parts in self._counts.items()}
        lists = (self._energies, self._counts, self._chats)
        seen = (part for path in sequences for of_path in lists for part in of_path[path])
        return {"tokens": self.tokens, "sequences": sequences}, seen

    def hear(self, told: dict[str, Any], tensors: Iterator[Tensor]) -> None:
        """Add what another one of the same sizes tells."""
        self.tokens += told["tokens"]
        for path, count in told["sequences"].items():
            for of_path in (self._energies, self._counts, self._chats):
                of_path[path] += [part.cpu() for part in islice(tensors, count)]

    def energy(self, path: str) -> float:
        """E|g|^2 over the tokens, g the gradient at the linear's output: `casp.moments.weights.typical_energy`."""
        if not self._counts[path]:
            return 0.0
        return typical_energy(*(torch.cat(of_path[path]) for of_path in (self._energies, self._counts, self._chats)))

    def counts(self) -> dict[str, int]:
        """How many tokens each linear saw, of those that did not see all of them (experts)."""
        found = {path: sum(int(part.sum()) for part in parts) for path, parts in self._counts.items()}
        return {path: count for path, count in found.items() if count != self.tokens}

    def top_up(self, index: int) -> None:
        """After all batches: experts of block `index` that saw few tokens borrow (`casp.moments.pool`)."""
        names = next(iter(self.inputs.values()), {})
        for name in names:
            top_up({path: moments[name] for path, moments in self.inputs.items()}, f"block {index}")
        top_up(self.outputs, f"block {index}, gradients")
