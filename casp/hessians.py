"""Hessians as a stage of their own: the second moment of every distinct input of the decoder's linears, on disk.

One file a block, `block-00000.safetensors`: for each group of matrices that share an input, the upper triangle of
`E[x x^T]` in float32, under the path of the group's first matrix; the header says which matrices share it, and the
digest of all. Collected in one pass over the calibration data, on the model as it is, so that any number of
quantizations can use them. (Weighing tokens by attention takes a second look at each block's attention.)
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from casp.attention import AttentionCall
from casp.errors import UserError, told_as
from casp.folder import RUN_FILE, WorkFolder, write_shard
from casp.models import Decoder
from casp.moments import SecondMoment
from casp.reading.documents import parse_json, read_json
from casp.reading.files import is_there
from casp.reading.header import read_header_with_metadata
from casp.walk import BatchInputs, Visit, capture_inputs, walk

Weighting = Callable[[AttentionCall, BatchInputs], Tensor]
"""Attention operands of a batch -> a weight for each of its tokens, (batch, tokens), at least 0."""

STAGES = ("hessians", "casp-hessians")
"""What the stage is called in its record: on a plain model, and on one with low-rank layers."""
_RECORD = "hessians"  # key of the header
_MOST = 4.0  # a weight never exceeds it: the first token of a text draws a hundred times its share and says nothing


def block_file(index: int) -> str:
    """Name of the file that holds the moments of block `index`."""
    return f"block-{index:05d}.safetensors"


def attention_received(call: AttentionCall, batch: BatchInputs) -> Tensor:
    """How much attention each token gets, in units of what it would get if all attention were uniform.

    (batch, tokens), `sum_i p_ij / sum_i 1 / n_i` over the queries i, the mean of all heads, where n_i keys are visible
    to query i; no more than 4, and padding counts neither as query nor as key.
    """
    heads, tokens = call.query.shape[1:3]
    received = torch.zeros(batch.tokens.shape, dtype=torch.float32, device=call.query.device)
    queries = batch.tokens[..., None].float()
    for head in range(heads):
        received += torch.where(queries > 0, call.probabilities(head), 0.0).sum(1)
    flat = AttentionCall(torch.zeros_like(call.query[:, :1]), torch.zeros_like(call.key[:, :1]), call.mask, 1.0)
    uniform = (flat.probabilities(0) * queries).sum(1)
    return (received / (heads * uniform).clamp_min(1 / tokens)).clamp_max(_MOST)


def token_weights(visit: Visit, weighting: Weighting | None) -> list[Tensor] | None:
    """The weights of all tokens that the block sees, (batch, tokens) for each batch; None where all count the same."""
    if weighting is None:
        return None
    weights: list[Tensor] = []

    def weigh(call: AttentionCall, batch: BatchInputs) -> None:
        weights.append(weighting(call, batch))
        if not torch.isfinite(weights[-1][batch.tokens]).all():
            raise UserError(
                f"block {visit.index}: its attention holds NaN or infinity; check the model's weights, or run in a "
                "wider --dtype"
            )

    visit.replay(attention=weigh)
    return weights


def block_moments(
    visit: Visit, groups: list[list[str]], weights: list[Tensor] | None = None, advance: bool = False
) -> list[Tensor]:
    """The second moment of each group's shared input, (in, in) float64, over all tokens that are not padding.

    weights: of the tokens, (batch, tokens) for each batch; advance: make the next block's inputs in the same pass.
    """
    moments = [SecondMoment(visit.block.get_submodule(group[0]).in_features, device=visit.device) for group in groups]

    def observer(moment: SecondMoment) -> Callable[[Tensor, BatchInputs], None]:
        remaining = iter(weights or [])

        def see(x: Tensor, batch: BatchInputs) -> None:
            moment.add(x[batch.tokens], None if weights is None else next(remaining)[batch.tokens])

        return see

    observers = {group[0]: observer(moment) for group, moment in zip(groups, moments, strict=True)}
    visit.replay(observers, advance=advance)
    return [moment.checked(f"block {visit.index}, {group[0]}") for group, moment in zip(groups, moments, strict=True)]


def collect(
    decoder: Decoder,
    folder: WorkFolder,
    batches: list[dict[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    weighting: Weighting | None = None,
) -> Path:
    """Collect the Hessians of all blocks into `folder`; those of an earlier attempt are taken as they are."""
    depth = len(decoder.blocks)
    done = sum((folder.folder / block_file(index)).exists() for index in range(depth))
    if done:
        print(f"resuming {folder.folder}: {done} of {depth} blocks are finished")
    if done < depth:
        inputs = capture_inputs(decoder, batches, device, dtype)
        progress = tqdm(total=depth - done, desc=folder.stage, unit="block", dynamic_ncols=True)
        for visit in walk(decoder, inputs, device, dtype, advance=lambda index: False):
            file = folder.folder / block_file(visit.index)
            is_last = visit.index == depth - 1
            if not file.exists():
                began = time.perf_counter()
                groups = visit.input_groups(list(decoder.linears(visit.index, factors=True).values()))
                found = block_moments(visit, groups, token_weights(visit, weighting), advance=not is_last)
                tensors = {group[0]: packed(moment) for group, moment in zip(groups, found, strict=True)}
                write_shard(file, tensors, {_RECORD: json.dumps({"groups": groups, "sha256": digest(groups, tensors)})})
                folder.log(f"block {visit.index} finished in {time.perf_counter() - began:.1f} s")
                progress.update()
            elif not is_last:
                visit.advance()
        progress.close()
    return folder.close()


WEIGHTINGS: dict[str, Weighting | None] = {"none": None, "attention": attention_received}
"""What --token-weights chooses from."""


def add_weighting_argument(parser: argparse.ArgumentParser) -> None:
    """--token-weights, of every stage that collects second moments for a quantizer."""
    parser.add_argument(
        "--token-weights",
        choices=WEIGHTINGS,
        default="attention",
        help="how much a token counts in the second moments: none = all the same, attention = as much as the attention "
        "that it gets in the block, in units of uniform attention and at most 4 (default: %(default)s)",
    )


def packed(hessian: Tensor) -> Tensor:
    """The upper triangle of a symmetric (n, n), row after row, float32."""
    rows, columns = torch.triu_indices(*hessian.shape, device=hessian.device)
    return hessian[rows, columns].float()


def unpacked(triangle: Tensor, size: int) -> Tensor:
    """The symmetric (size, size) float32 of which `triangle` is the upper half."""
    rows, columns = torch.triu_indices(size, size)
    hessian = torch.empty(size, size)
    hessian[rows, columns] = triangle
    hessian[columns, rows] = triangle
    return hessian


def digest(groups: list[list[str]], triangles: Mapping[str, Tensor]) -> str:
    """SHA-256 over the groups of a block and the bytes of their moments, by the path of each group's first matrix."""
    found = hashlib.sha256(json.dumps(groups).encode())
    for group in groups:
        found.update(triangles[group[0]].cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


class Hessians:
    """The finished folder of the Hessian stage, read block by block."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        unfit = UserError(
            f"--hessians {self.folder} is not a finished folder of the Hessian stage; give one that hfize_*.sh made."
        )
        if not is_there(self.folder / RUN_FILE):
            raise unfit
        self.fingerprint = read_json(self.folder / RUN_FILE, "the record").get("fingerprint")
        if not isinstance(self.fingerprint, dict) or self.fingerprint.get("stage") not in STAGES:
            raise unfit

    def check(self, model: str, decoder: Decoder) -> None:
        """UserError unless they were collected on the checkpoint of content hash `model`, with all its blocks."""
        if self.fingerprint.get("model") != model:
            raise UserError(
                f"--hessians {self.folder} were collected on another model than {decoder.folder}; collect them on "
                "this one with hfize_*.sh."
            )
        missing = [i for i in range(len(decoder.blocks)) if not is_there(self.folder / block_file(i))]
        if missing:
            raise UserError(f"--hessians {self.folder} lacks block {missing[0]}; collect them again to another folder.")

    def read(self, index: int, sizes: dict[str, int]) -> list[tuple[list[str], Tensor]]:
        """Block `index`: each group of matrices, by path, with the second moment of their input, (in, in) float32.

        sizes: path -> width of its input. UserError for anything but what the Hessian stage wrote of such a block.
        """
        file = self.folder / block_file(index)
        remedy = "collect the Hessians again to another folder"
        entries, metadata = read_header_with_metadata(file)
        record = parse_json(metadata.get(_RECORD, "null"), f"the record of {file}", remedy)
        groups = record.get("groups")
        if not isinstance(groups, list) or not all(isinstance(group, list) and group for group in groups):
            raise UserError(f"{file} does not say which matrices share a moment; {remedy}.")
        if sorted(str(path) for group in groups for path in group) != sorted(sizes):
            raise UserError(f"{file} holds moments of other matrices than those of block {index}; {remedy}.")
        for group in groups:
            width, entry = sizes[group[0]], entries.get(group[0])
            if any(sizes[path] != width for path in group):
                raise UserError(f"{file} lets matrices of different inputs share a moment; {remedy}.")
            if entry is None or entry.dtype != "F32" or entry.shape != (width * (width + 1) // 2,):
                raise UserError(f"{file} holds no moment of {width} inputs for {group[0]}; {remedy}.")
        with told_as(f"{file} is damaged", remedy), safe_open(file, "pt") as stored:
            triangles = {group[0]: stored.get_tensor(group[0]) for group in groups}
        if record.get("sha256") != digest(groups, triangles):
            raise UserError(f"{file} is not what the Hessian stage wrote; {remedy}.")
        for path, triangle in triangles.items():
            if not torch.isfinite(triangle).all() or not triangle.any():
                raise UserError(f"{file}: the moment of {path} is zero or not finite; {remedy}.")
        return [(group, unpacked(triangles[group[0]], sizes[group[0]])) for group in groups]
