"""Moments on disk: two safetensors files a block, and their reader.

`inputs-00000.safetensors`, from the forward pass, holds for each group of linears that share an input and each
weighting ("none", "attention") that was asked for the upper triangle of the second moment of that input, row after
row, float32, 2 in (in + 1) bytes, named `GROUP/WEIGHTING` after the group's first path. `gradients-00000.safetensors`,
from the backward pass, holds for W_q and W_k `PATH/outputs`, the triangle of E[g g^T] / E|g|^2, 2 out (out + 1)
bytes, and for every linear and each weighting by gradient `PATH/WEIGHTING`, 2 in (in + 1) bytes: these differ between
linears that share an input.
Paths are relative to the block; what else is known of a block stands as JSON in the headers, the digest of every tensor
among it.

For Llama-2-7B that is 343 MB a block for each of "none" and "attention", 443 MB for each weighting by gradient and
67 MB for G.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from casp.errors import UserError, told_as
from casp.linear import is_finite
from casp.model.decoder import Decoder
from casp.moments.backward import OUTPUTS, GradientStatistics
from casp.moments.forward import InputStatistics
from casp.moments.second_moment import SecondMoment, diagonal, unpacked
from casp.moments.weights import by_gradient, weighting_parts
from casp.reading.documents import parse_json
from casp.reading.files import is_there
from casp.reading.header import read_header_with_metadata
from casp.run.digest import file_digest, hash_of
from casp.run.files import write_shard
from casp.run.folder import RESULT
from casp.run.outputs import KINDS, read_record

_HEADER = "block"  # key of the header
REMEDY = "hessian_offline_*.sh"
_AGAIN = f"collect the moments again with {REMEDY} and another --output"


def inputs_file(index: int) -> str:
    """Name of the file with the moments of the inputs of block `index`."""
    return f"inputs-{index:05d}.safetensors"


def gradients_file(index: int) -> str:
    """Name of the file with the moments that the gradients of block `index` gave."""
    return f"gradients-{index:05d}.safetensors"


def write_inputs(file: Path, found: InputStatistics, index: int) -> None:
    """What the forward passes of block `index` told, moments forgotten; UserError for NaN and where no token counts."""
    header = {
        "groups": found.groups,
        "tokens": found.tokens,
        "influence": found.influence.value(index),
        "density": found.density.value(),
    }
    moments = {f"{path}/{name}": moment for path, named in found.moments.items() for name, moment in named.items()}
    _write(file, index, header, moments)


def write_gradients(file: Path, index: int, found: GradientStatistics, losses: int, loss: float) -> None:
    """What the backward passes of block `index` told, whose moments are forgotten.

    losses: positions with a loss; loss: their sum in nats.
    """
    energy = {path: found.energy(path) for path in found.inputs}
    header = {"energy": energy, "tokens": found.tokens, "losses": losses, "loss": loss, "counts": found.counts()}
    moments = {f"{path}/{OUTPUTS}": moment for path, moment in found.outputs.items()}
    moments |= {f"{path}/{name}": moment for path, named in found.inputs.items() for name, moment in named.items()}
    _write(file, index, header, moments)


def _write(file: Path, index: int, header: dict[str, Any], moments: Mapping[str, SecondMoment]) -> None:
    tensors = {}
    for name, moment in moments.items():
        tensors[name] = moment.triangle(f"block {index}, {name}")
        moment.forget()  # the sums of a block and its triangles together are twice the memory
    header["sha256"] = {name: digest(tensor) for name, tensor in tensors.items()}
    write_shard(file, tensors, {_HEADER: json.dumps({"header": header, "sha256": _header_digest(header)})})


def digest(triangle: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hex."""
    return hashlib.sha256(triangle.cpu().contiguous().numpy().data).hexdigest()


def _header(file: Path) -> dict[str, Any]:
    _, metadata = read_header_with_metadata(file)
    record = parse_json(metadata.get(_HEADER, "null"), f"the record of {file}", _AGAIN)
    header = record.get("header")
    if not isinstance(header, dict) or record.get("sha256") != _header_digest(header):
        raise UserError(f"the record of {file} is not what the moments' stage wrote; {_AGAIN}.")
    return header


def _header_digest(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class LinearMoments:
    """What is known of one linear; moments are read when they are asked for.

    path: relative to the block; group: the first path of those that share its input; energy: E|g|^2 over tokens, g the
    gradient of the summed loss at the linear's output, outliers bounded, None without a backward pass; tokens: how many
    the means are over; losses: how many of them have a loss: ``1/2 tokens / losses tr(G D H D^T)`` is the predicted
    damage of an error D in nats a loss. digests: of the tensors that the block's files hold.
    """

    folder: Path
    block: int
    path: str
    group: str
    tokens: int
    losses: int | None
    energy: float | None
    digests: Mapping[str, str]

    def hessian(self, weighting: str, sized_as: str | None = None) -> Tensor:
        """The second moment of its input, (in, in) float32, of `weighting`.

        A weighting of one part is the weighted mean ``sum w x x^T / sum w``; one of several, "attention+gradient", is
        the sum of its parts, each scaled to a mean diagonal of 1. sized_as: a weighting of one part whose trace it is
        to have, as costs are measured in that by gradients. UserError for a weighting that was not collected.
        """
        parts = weighting_parts(weighting)
        means: dict[str, Tensor] = {}
        total: Tensor | None = None
        for part in parts:
            moment = self._read(part)
            means[part] = diagonal(moment).mean()
            if len(parts) > 1:
                # An input that never occurs, or one no loss depends on, adds nothing.
                moment = moment.div_(means[part].clamp_min(torch.finfo(torch.float32).tiny))
            total = moment if total is None else total.add_(moment)
        if sized_as is not None and (own := diagonal(total).mean()) > 0:
            wanted = means[sized_as] if sized_as in means else diagonal(self._read(sized_as)).mean()
            total.mul_(wanted / own)
        return unpacked(total)

    @property
    def gradient_moment(self) -> Tensor | None:
        """``G = E[g g^T]``, (out, out) float32, of trace `energy`; UserError without a backward pass.

        None of a linear that is not of `casp.lowrank.LOW_RANK_ROLES`: of the others only the energy is collected.
        """
        if self.energy is not None and f"{self.path}/{OUTPUTS}" not in self.digests:
            return None
        return unpacked(self._read(OUTPUTS)) * self.energy

    def _read(self, part: str) -> Tensor:
        """The upper half of one moment, (n (n + 1) / 2,) float32."""
        of_gradients = part == OUTPUTS or by_gradient(part)
        file = self.folder / (gradients_file if of_gradients else inputs_file)(self.block)
        name = f"{self.path if of_gradients else self.group}/{part}"
        if name not in self.digests:
            what = "gradients" if part == OUTPUTS else f"token weights {part!r}"
            raise UserError(f"{self.folder} was collected without {what}; {_AGAIN}.")
        with told_as(f"{file} is damaged", _AGAIN), safe_open(file, "pt") as stored:
            triangle = stored.get_tensor(name)
        if digest(triangle) != self.digests[name]:
            raise UserError(f"{file} is not what the moments' stage wrote; {_AGAIN}.")
        may_be_zero = of_gradients and not self.energy  # no loss depends on this linear
        if not is_finite(triangle) or not (may_be_zero or diagonal(triangle).any()):
            raise UserError(f"{file}: the moment {name} is zero or not finite; {_AGAIN}.")
        return triangle.float()


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

    def sharing(self, paths: Sequence[str], weighting: str) -> list[list[str]]:
        """`paths`, which share an input, by the moment of it under `weighting`: gradients differ between linears."""
        own = any(by_gradient(part) for part in weighting_parts(weighting))
        return [[path] for path in paths] if own or not paths else [list(paths)]


class Moments:
    """The finished folder of the moments' stage, read block by block."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        record = read_record(self.folder)
        if record is None or record["kind"] != "moments":
            found = f"is {KINDS[record['kind']]}" if record else "is not a finished folder of moments"
            raise UserError(f"{self.folder} {found}; give the output of {REMEDY}.")
        if (self.folder / RESULT).exists():
            raise UserError(f"{self.folder} is not finished; run the same {REMEDY} again: it resumes.")
        self.fingerprint: dict[str, Any] = record["fingerprint"]
        settings = self.fingerprint["settings"]
        if not isinstance(settings.get("token_weights"), list) or not isinstance(settings.get("gradients"), bool):
            raise UserError(f"{self.folder} does not say which moments it holds; {_AGAIN}.")
        self.weightings: tuple[str, ...] = tuple(settings["token_weights"])
        self.has_gradients: bool = settings["gradients"]

    def _files(self, decoder: Decoder) -> list[str]:
        kinds = [inputs_file, gradients_file] if self.has_gradients else [inputs_file]
        return [name(index) for index in range(len(decoder.blocks)) for name in kinds]

    def identity(self, decoder: Decoder) -> dict[str, Any]:
        """What moments these are, for the record of a run that uses them: fingerprint and a hash of every byte."""
        content = hash_of({name: file_digest(self.folder / name) for name in self._files(decoder)})
        return {**self.fingerprint, "content": content}

    def check(self, model: str, decoder: Decoder, weighting: str | None = None) -> None:
        """UserError unless they were collected on the checkpoint of content hash `model`, with all its blocks.

        weighting: token weights that must be among those collected.
        """
        if self.fingerprint.get("model") != model:
            raise UserError(
                f"{self.folder} was collected on another model than {decoder.folder}; collect moments of this one "
                f"with {REMEDY}."
            )
        missing = [name for name in self._files(decoder) if not is_there(self.folder / name)]
        if missing:
            raise UserError(f"{self.folder} lacks {missing[0]}; {_AGAIN}.")
        for part in () if weighting is None else weighting_parts(weighting):
            if part not in self.weightings:
                raise UserError(
                    f"{self.folder} was collected without token weights {part!r} (it has "
                    f"{', '.join(self.weightings)}); choose among these or collect again with {REMEDY}."
                )

    def read(self, index: int) -> BlockMoments:
        """What is known of block `index`; UserError for a damaged file."""
        found, file = BlockMoments(), self.folder / inputs_file(index)
        inputs, gradients = _header(file), None
        if self.has_gradients:
            file = self.folder / gradients_file(index)
            gradients = _header(file)
        with told_as(f"the header of {file} is damaged", _AGAIN):
            found.groups, found.influence, found.density = inputs["groups"], inputs["influence"], inputs["density"]
            found.loss = None if gradients is None else gradients["loss"] / max(gradients["losses"], 1)
            digests = inputs["sha256"] | ({} if gradients is None else gradients["sha256"])
            for group in found.groups:
                for path in group:
                    energy = None if gradients is None else gradients["energy"][path]
                    losses = None if gradients is None else gradients["losses"]
                    seen = (gradients or {}).get("counts", {}).get(path, inputs["tokens"])
                    known = (seen, losses, energy, digests)
                    found[path] = LinearMoments(self.folder, index, path, group[0], *known)
        return found
