"""Moments on disk: two safetensors files a block, and their reader.

`inputs-00000.safetensors`, from the forward pass, holds for each group of linears that share an input and each
weighting ("none", "attention") that was asked for the upper triangle of the second moment of that input, row after
row, float32, 2 in (in + 1) bytes, named `GROUP/WEIGHTING` after the group's first path. `gradients-00000.safetensors`,
from the backward pass, holds for each linear `PATH/outputs`, the triangle of G = E[g g^T], 2 out (out + 1) bytes, and
for each weighting by gradient `PATH/WEIGHTING`, 2 in (in + 1) bytes: these differ between linears that share an input.
Paths are relative to the block; what else is known of a block stands as JSON in the headers.

For Llama-2-7B that is 343 MB a block for each of "none" and "attention", 443 MB for each weighting by gradient and
652 MB for G.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from casp.errors import UserError
from casp.folder import RUN_FILE, write_shard
from casp.models import Decoder
from casp.moments.backward import GradientStatistics
from casp.moments.forward import InputStatistics
from casp.moments.second_moment import unpacked
from casp.moments.weights import by_gradient, weighting_parts

_HEADER = "block"  # key of the header
_OUTPUTS = "outputs"
REMEDY = "hessian_offline_*.sh"


def inputs_file(index: int) -> str:
    """Name of the file with the moments of the inputs of block `index`."""
    return f"inputs-{index:05d}.safetensors"


def gradients_file(index: int) -> str:
    """Name of the file with the moments that the gradients of block `index` gave."""
    return f"gradients-{index:05d}.safetensors"


def write_inputs(file: Path, found: InputStatistics) -> None:
    """What the forward passes of a block told."""
    header = {
        "groups": found.groups,
        "tokens": found.tokens,
        "influence": found.influence.value(),
        "density": found.density.value(),
    }
    tensors = {
        f"{path}/{name}": moment.triangle() for path, named in found.moments.items() for name, moment in named.items()
    }
    write_shard(file, tensors, {_HEADER: json.dumps(header)})


def write_gradients(file: Path, found: GradientStatistics, losses: int, loss: float) -> None:
    """What the backward passes of a block told; losses: positions with a loss, loss: their sum in nats."""
    energy = {path: total / found.tokens for path, total in found.energy.items()}
    header = {"energy": energy, "tokens": found.tokens, "losses": losses, "loss": loss}
    tensors = {f"{path}/{_OUTPUTS}": moment.triangle() for path, moment in found.outputs.items()}
    tensors |= {
        f"{path}/{name}": moment.triangle() for path, named in found.inputs.items() for name, moment in named.items()
    }
    write_shard(file, tensors, {_HEADER: json.dumps(header)})


def _header(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as stored:
        return json.loads(stored.metadata()[_HEADER])


@dataclass(frozen=True)
class LinearMoments:
    """What is known of one linear; moments are read when they are asked for.

    path: relative to the block; group: the first path of those that share its input; energy: E|g|^2 over tokens, g the
    gradient of the summed loss at the linear's output, None without a backward pass; tokens: how many the means are
    over; losses: how many of them have a loss: ``1/2 tokens / losses tr(G D H D^T)`` is the predicted damage of an
    error D in nats a loss.
    """

    folder: Path
    block: int
    path: str
    group: str
    tokens: int
    losses: int | None
    energy: float | None

    def hessian(self, weighting: str) -> Tensor:
        """The second moment of its input, (in, in) float32, of `weighting`.

        A weighting of one part is the weighted mean ``sum w x x^T / sum w``; one of several, "attention+gradient", is
        the sum of its parts, each scaled to a mean diagonal of 1. UserError for a weighting that was not collected.
        """
        parts = weighting_parts(weighting)
        moments = (self._read(part) for part in parts)
        if len(parts) == 1:
            return next(moments)
        total: Tensor | float = 0.0
        for moment in moments:
            # An input that never occurs, or one no loss depends on, adds nothing.
            total = total + moment / moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        return total

    @property
    def gradient_moment(self) -> Tensor:
        """``G = E[g g^T]``, (out, out) float32, the mean over all tokens; UserError without a backward pass."""
        return self._read(_OUTPUTS)

    def _read(self, part: str) -> Tensor:
        of_gradients = part == _OUTPUTS or by_gradient(part)
        file = self.folder / (gradients_file if of_gradients else inputs_file)(self.block)
        name = f"{self.path if of_gradients else self.group}/{part}"
        try:
            with safe_open(file, "pt") as stored:
                if name in stored.keys():  # noqa: SIM118 - not a dict
                    return unpacked(stored.get_tensor(name))
        except FileNotFoundError:
            pass
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(file, self.folder) from error
        what = "gradients" if part == _OUTPUTS else f"token weights {part!r}"
        raise UserError(f"{self.folder} was collected without {what}; collect it again with {REMEDY}.")


class BlockMoments(dict[str, LinearMoments]):
    """The moments of one block's linears by path relative to the block.

    groups: paths that share an input, in the order of computation; influence: `1 - E[cos]` of the hidden states that
    enter and leave; density: share of the attention map in use, {"image", "text"}; loss: mean nats a position, None
    without a backward pass.
    """

    groups: list[list[str]]
    influence: float
    density: dict[str, float | None]
    loss: float | None


class Moments:
    """The finished folder of the moments' stage, read block by block."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            self.fingerprint: dict[str, Any] = json.loads((self.folder / RUN_FILE).read_text())["fingerprint"]
            settings = self.fingerprint["settings"]
            self.weightings: tuple[str, ...] = tuple(settings["token_weights"])
            self.has_gradients: bool = settings["gradients"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder} is not a finished folder of moments; run {REMEDY} first.") from error

    def check(self, model: str, decoder: Decoder, weighting: str | None = None) -> None:
        """UserError unless they were collected on the checkpoint of content hash `model`, with all its blocks.

        weighting: token weights that must be among those collected.
        """
        if self.fingerprint.get("model") != model:
            raise UserError(
                f"{self.folder} was collected on another model than {decoder.folder}; collect moments of this one "
                f"with {REMEDY}."
            )
        files = [inputs_file, gradients_file] if self.has_gradients else [inputs_file]
        for index in range(len(decoder.blocks)):
            if not all((self.folder / name(index)).is_file() for name in files):
                raise UserError(f"{self.folder} lacks block {index}; remove the folder and collect again.")
        for part in () if weighting is None else weighting_parts(weighting):
            if part not in self.weightings:
                raise UserError(
                    f"{self.folder} was collected without token weights {part!r} (it has "
                    f"{', '.join(self.weightings)}); choose among these or collect again with {REMEDY}."
                )

    def read(self, index: int) -> BlockMoments:
        """What is known of block `index`; UserError for a damaged file."""
        found, file = BlockMoments(), self.folder / inputs_file(index)
        try:
            inputs, gradients = _header(file), None
            if self.has_gradients:
                file = self.folder / gradients_file(index)
                gradients = _header(file)
            found.groups, found.influence, found.density = inputs["groups"], inputs["influence"], inputs["density"]
            found.loss = None if gradients is None else gradients["loss"] / max(gradients["losses"], 1)
            for group in found.groups:
                for path in group:
                    energy = None if gradients is None else gradients["energy"][path]
                    losses = None if gradients is None else gradients["losses"]
                    found[path] = LinearMoments(self.folder, index, path, group[0], inputs["tokens"], losses, energy)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise _damaged(file, self.folder) from error
        return found


def _damaged(file: Path, folder: Path) -> UserError:
    return UserError(f"{file} is damaged; remove {folder} and collect the moments again with {REMEDY}.")
