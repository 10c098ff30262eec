"""Fine-tuning within a block: what is not quantized yet makes up for what is.

QuIP# (Tseng et al. 2024, arXiv 2402.04396, section 5): after each group of linears has been quantized, the rest of
the block (norms, the quantizer's own real tensors, weights still to be quantized) learns what the original model's
block puts out. The inputs are those that the compressed blocks before it produce, the targets what the original
model has after this block, so that a block also repairs what those before it did.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from casp.backend import Backend
from casp.errors import UserError, told_as
from casp.linear import QuantizedLinear, stored_as
from casp.model.inputs import BatchInputs, first_output, moved
from casp.ranks import ALONE, Message, Ranks
from casp.reading.documents import parse_json
from casp.run.files import write_shard
from casp.walk import Visit

VALIDATION_SHARE = 8  # one batch in so many is not trained on
PATIENCE = 2  # epochs without a better validation loss after which training stops
_ADAM = ("step", "exp_avg", "exp_avg_sq")

Curve = list[dict[str, float | None]]
"""Losses by epoch, see `train`."""


@dataclass(frozen=True)
class Training:
    """How long and how fast: passes over the training batches, and the step of Adam relative to a tensor's size.

    batches: how many make a step together.
    """

    epochs: int
    learning_rate: float
    batches: int = 1


@dataclass(frozen=True)
class Lessons:
    """What is trained on: of each batch the number of tokens that its loss is the mean over, and who shares them out.

    The loss of a step is the mean over the tokens of all its batches. Its gradient is the sum of theirs, added in their
    order, so that it does not depend on which rank computes which.
    """

    tokens: Sequence[int]
    ranks: Ranks = ALONE

    def steps(self, size: int) -> list[list[int]]:
        """Numbers of the batches of each step of `size`, those without tokens left out."""
        numbers = [number for number, tokens in enumerate(self.tokens) if tokens]
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def share(self, number: int, step: Sequence[int]) -> float:
        """What batch `number` of a step counts in it."""
        return self.tokens[number] / sum(self.tokens[other] for other in step)

    def descend(self, masters: "Masters", loss: Callable[[int], Tensor], step: Sequence[int]) -> float | None:
        """Leave the gradient of a step in the leaves, on all ranks; its loss, on rank 0."""
        leaves, total = list(masters.leaves.values()), 0.0

        def packed(gradients: Sequence[Tensor | None], header: Any = None) -> Message:
            """One tensor that holds all gradients there are: many small ones would take long on the way."""
            used = [place for place, gradient in enumerate(gradients) if gradient is not None]
            return Message([used, header], [torch.cat([gradients[place].flatten() for place in used])])

        def add(message: Message) -> None:
            used, (row,) = message.header[0], message.tensors
            parts = row.split([leaves[place].numel() for place in used])
            for leaf, part in zip((leaves[place] for place in used), parts, strict=True):
                gradient = part.view_as(leaf).to(leaf.device)
                leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)

        def here(number: int) -> None:
            nonlocal total
            value = loss(number) * self.share(number, step)
            value.backward()
            total += value.item()

        def away(number: int) -> Message:
            value = loss(number) * self.share(number, step)
            return packed(torch.autograd.grad(value, leaves, allow_unused=True), value.item())

        def absorb(message: Message) -> None:
            nonlocal total
            total += message.header[1]
            add(message)

        self.ranks.in_order(step, here, away, absorb)
        if self.ranks.size > 1:
            whole = self.ranks.everywhere(packed([leaf.grad for leaf in leaves]) if self.ranks.first else None)
            if not self.ranks.first:
                add(whole)
        return total if self.ranks.first else None

    @torch.no_grad()
    def measure(self, loss: Callable[[int], Tensor], steps: Sequence[Sequence[int]]) -> list[float]:
        """The loss of each of `steps`, on all ranks."""
        ranks, wanted = self.ranks, [number for step in steps for number in step]
        mine = [[number, loss(number).item()] for number in wanted if number % ranks.size == ranks.rank]
        found = {number: value for part in ranks.gathered(mine) for number, value in part}
        return [sum(found[number] * self.share(number, step) for number in step) for step in steps]


def split(count: int) -> tuple[list[int], list[int]]:
    """Numbers of the batches to train on and of those to validate on; one batch alone serves for both."""
    validation = list(range(VALIDATION_SHARE - 1, count, VALIDATION_SHARE)) or [count - 1]
    return [i for i in range(count) if i not in validation] or validation, validation


def tunable_tensors(module: nn.Module, backend: Backend) -> dict[str, Tensor]:
    """What fine-tuning may move in `module`, by name: all parameters, and what the backend offers of its layers."""
    quantized = {path: layer for path, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}
    inside = tuple(path + "." for path in quantized)
    found: dict[str, Tensor] = {
        name: parameter for name, parameter in module.named_parameters() if not name.startswith(inside)
    }
    for path, layer in quantized.items():
        found |= {f"{path}.{name}": tensor for name, tensor in backend.tunable(layer).items()}
    return found


class Masters:
    """float32 copies, with gradients, of tensors in use; what is learned goes back by `write`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.leaves = {name: tensor.detach().float().clone().requires_grad_() for name, tensor in self.tensors.items()}

    def groups(self, learning_rate: float) -> list[dict]:
        """Parameter groups of an optimizer, each tensor's rate in units of its own root mean square."""
        sizes = {name: leaf.detach().square().mean().sqrt().item() for name, leaf in self.leaves.items()}
        return [{"params": [leaf], "lr": learning_rate * (sizes[name] or 1.0)} for name, leaf in self.leaves.items()]

    def in_use(self) -> dict[str, Tensor]:
        """The leaves as a forward pass takes them: parameters in their own dtype, a format's buffers in float32.

        Buffers of one byte a number are what will be stored, with the gradient passed straight through the rounding
        (Bengio et al. 2013, arXiv 1308.3432): it is coarse enough for the loss to be another.
        """
        return {name: self._in_use(leaf, self.tensors[name]) for name, leaf in self.leaves.items()}

    @staticmethod
    def _in_use(leaf: Tensor, tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            return leaf.to(tensor.dtype)
        if tensor.element_size() > 1:
            return leaf
        return leaf + (stored_as(leaf.detach(), tensor.dtype).float() - leaf.detach())

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the leaves."""
        return {name: leaf.detach().clone() for name, leaf in self.leaves.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the leaves."""
        for name, leaf in self.leaves.items():
            leaf.copy_(values[name])

    @torch.no_grad()
    def write(self) -> None:
        """Round the leaves into the tensors in use."""
        for name, leaf in self.leaves.items():
            self.tensors[name].copy_(stored_as(leaf, self.tensors[name].dtype))


def relative_error(output: Tensor, target: Tensor, tokens: Tensor) -> Tensor:
    """Mean over `tokens` (batch, tokens) bool of `|output - target|^2 / |target|^2`, both (batch, tokens, hidden)."""
    error = (output.float() - target.float()).square().sum(-1) / target.float().square().sum(-1).clamp_min(1e-12)
    return error[tokens].mean()


def cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: from 1 down to 0 along half a cosine."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def train(
    masters: Masters,
    loss: Callable[[int], Tensor],
    lessons: Lessons,
    training: Training,
    generator: torch.Generator,
    state: Path | None = None,
    progress: str | None = None,
    name: str = "end to end",
) -> Curve:
    """Adam on `loss(number)` of the batches of `lessons`; the leaves end as they were at the best validation loss.

    Returns the curve: one entry per epoch, that before the first included, {"training", "validation"} (the loss of
    training is the mean during the epoch, None before the first). Stops early after two epochs without a better
    validation loss. state: a file kept after each epoch, from which an interrupted training goes on to the same
    end; progress: a label for the bar, None for no bar; name: of what is trained, for the UserError that a loss of NaN
    or infinity is.
    """
    ranks, every_step = lessons.ranks, lessons.steps(training.batches)
    if not every_step:
        raise UserError(f"{name}: the calibration data has no token to learn from; give other data.")
    learn, check = split(len(every_step))
    optimizer = torch.optim.Adam(masters.groups(training.learning_rate), betas=(0.9, 0.95))
    steps = max(training.epochs * len(learn), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
    orders = [torch.randperm(len(learn), generator=generator).tolist() for _ in range(training.epochs)]

    def finite(found: float) -> float:
        if not math.isfinite(found):
            raise UserError(
                f"{name}: the loss of fine-tuning is {found}; lower its learning rate, or run in a wider --dtype."
            )
        return found

    def validation() -> float:
        return sum(map(finite, lessons.measure(loss, [every_step[i] for i in check]))) / len(check)

    if state is not None and ranks.told(state.exists):
        curve, best = load_state(state, masters, optimizer, schedule)
    else:
        curve, best = [{"training": None, "validation": validation()}], masters.snapshot()
    bar = tqdm(total=steps, initial=(len(curve) - 1) * len(learn), desc=progress, disable=progress is None)
    while len(curve) <= training.epochs and not stalled(curve):
        total = 0.0
        for place in orders[len(curve) - 1]:
            optimizer.zero_grad()
            now = lessons.descend(masters, loss, every_step[learn[place]])
            optimizer.step()
            schedule.step()
            if now is not None:
                total += finite(now)
                bar.set_postfix_str(f"training {now:.4f}, validation {curve[-1]['validation']:.4f}")
            bar.update()
        mean = total / len(learn)
        curve.append({"training": ranks.told(lambda mean=mean: mean), "validation": validation()})
        if curve[-1]["validation"] < min(entry["validation"] for entry in curve[:-1]):
            best = masters.snapshot()
        if state is not None and ranks.first:
            save_state(state, masters, optimizer, curve, best)
    bar.close()
    masters.load(best)
    return curve


def stalled(curve: Curve) -> bool:
    """Whether the last two epochs brought no better validation loss than there was before them."""
    losses = [entry["validation"] for entry in curve]
    return len(losses) > PATIENCE and min(losses[-PATIENCE:]) >= min(losses[:-PATIENCE])


def save_state(
    file: Path, masters: Masters, optimizer: torch.optim.Adam, curve: Curve, best: Mapping[str, Tensor]
) -> None:
    """Keep a training between two epochs, atomically."""
    tensors = {}
    for name, leaf in masters.leaves.items():
        moments = optimizer.state.get(leaf) or {}
        tensors |= {f"{key} {name}": moments[key] for key in _ADAM if key in moments}
        tensors |= {f"leaf {name}": leaf.detach(), f"best {name}": best[name]}
    write_shard(file, tensors, {"curve": json.dumps(curve)})


def load_state(
    file: Path, masters: Masters, optimizer: torch.optim.Adam, schedule: torch.optim.lr_scheduler.LambdaLR
) -> tuple[Curve, dict[str, Tensor]]:
    """Set leaves, optimizer and schedule as `save_state` left them; returns the curve and the best leaves."""
    again = f"move {file.parent} away and run the same command again: it begins anew"
    with told_as(f"{file}, what was learned so far, is damaged", again), safe_open(file, "pt") as stored:
        curve = parse_json(stored.metadata()["curve"], f"the curve in {file}", again, list)
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
    device = {name: leaf.device for name, leaf in masters.leaves.items()}
    masters.load({name: tensors[f"leaf {name}"] for name in device})
    done = 0
    for name, leaf in masters.leaves.items():
        moments = {key: tensors[f"{key} {name}"] for key in _ADAM if f"{key} {name}" in tensors}
        if moments:
            optimizer.state[leaf] = {key: value.to(device[name]) for key, value in moments.items()}
            optimizer.state[leaf]["step"] = moments["step"]  # Adam counts on the CPU
            done = max(done, int(moments["step"]))
    for group, base in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = base * schedule.lr_lambdas[0](done)
    schedule.last_epoch = done
    return curve, {name: tensors[f"best {name}"].to(device[name]) for name in device}


def tune_block(
    visit: Visit, targets: list[Tensor], backend: Backend, training: Training, generator: torch.Generator
) -> Curve:
    """Teach the block, as far as it is quantized, to put out `targets`; returns the curve of `train`.

    targets: one (batch, tokens, hidden) per batch of `visit.inputs`. The block's tensors are changed in place. Ranks
    that visit it together share out the batches, and all of them learn the same.
    """
    ranks = visit.ranks
    masters = Masters(tunable_tensors(visit.block, backend))

    lessons = Lessons(ranks.by_item([int(batch.tokens.sum()) for batch in visit.inputs]), ranks)

    def loss(number: int) -> Tensor:
        batch, target = visit.inputs[number // ranks.size], targets[number // ranks.size]
        output = run_block(visit.block, masters.in_use(), batch, visit.index, batch.hidden.to(visit.device))
        return relative_error(output, target.to(visit.device), batch.tokens.to(visit.device))

    with torch.enable_grad():
        curve = train(masters, loss, lessons, training, generator, name=f"block {visit.index}")
    masters.write()
    return curve


def run_block(
    block: nn.Module, tensors: Mapping[str, Tensor], batch: BatchInputs, index: int, hidden: Tensor
) -> Tensor:
    """What block `index` makes of `hidden` (batch, tokens, hidden), `tensors` in place of its own of these names."""
    return first_output(functional_call(block, tensors, (hidden,), moved(batch.kwargs[index], hidden.device)))
