"""The plan as a file: JSON that can be read, edited and obeyed.

    {"version": 1, "model": content hash, "backend": ..., "record": {...}, "bytes": ..., "bits": ..., "predicted": ...,
     "fingerprint": of all ranks and formats as they were made,
     "linears": {"model.layers.0.self_attn.q_proj": {"rank": 108, "formats": [{...}, {...}], "bytes": ...,
                                                     "predicted": ...}}}

`rank` is null for full rank, which has one format; a rank has two, of `down` (rank, in) and of `up` (out, rank). Only
`rank` and `formats` are obeyed: bytes are counted anew, predictions stay what they were.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casp.backend import Backend
from casp.errors import UserError, in_brief
from casp.model.decoder import Decoder
from casp.plan.options import Option, option_bytes, stored_shapes
from casp.reading.documents import read_json
from casp.reading.files import is_there
from casp.run.files import make_folder, write_json

VERSION = 1
SHAPE = {"linears", "predicted"}  # keys that a file is told as a plan by


@dataclass(frozen=True)
class Plan:
    """Path of every linear from the model's root -> how it is stored.

    model: content hash of the checkpoint that it is for; record: how it was made; original_weights: of all linears.
    """

    model: str
    backend: str
    original_weights: int
    linears: Mapping[str, Option]
    record: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """Of all linears."""
        return sum(option.bytes for option in self.linears.values())

    @property
    def bits(self) -> float:
        """Bits per original weight, every overhead counted."""
        return 8 * self.bytes / self.original_weights

    @property
    def predicted(self) -> float:
        """Predicted rise of the model's loss, nats a token."""
        return sum(option.cost for option in self.linears.values())

    def fingerprint(self) -> str:
        """SHA-256 of what decides the outcome: ranks and formats."""
        return _fingerprint(self.backend, {path: [one.rank, one.formats] for path, one in self.linears.items()})


def _fingerprint(backend: Any, decisive: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([backend, decisive], sort_keys=True).encode()).hexdigest()


def refuse_edited(file: Path) -> None:
    """UserError where `file` holds a plan whose ranks or formats are no longer those that were made."""
    if not is_there(file):
        return
    found = _json(file)
    entries = [entry if isinstance(entry, dict) else {} for entry in found["linears"].values()]
    decisive = [[entry.get("rank"), entry.get("formats")] for entry in entries]
    now = _fingerprint(found.get("backend"), dict(zip(found["linears"], decisive, strict=True)))
    if now != found.get("fingerprint", now):
        raise UserError(f"{file} was edited since it was made and would be lost; give it as --plan, or move it away.")


def write_plan(file: Path, plan: Plan) -> None:
    """`plan` as JSON, atomically; UserError where `file` cannot be written or holds a plan that was edited."""
    refuse_edited(file)
    linears = {
        path: {"rank": option.rank, "formats": list(option.formats), "bytes": option.bytes, "predicted": option.cost}
        for path, option in plan.linears.items()
    }
    entry = {
        "version": VERSION,
        "model": plan.model,
        "backend": plan.backend,
        "record": plan.record,
        "bytes": plan.bytes,
        "bits": plan.bits,
        "predicted": plan.predicted,
        "fingerprint": plan.fingerprint(),
        "linears": linears,
    }
    try:
        make_folder(file.parent)
        write_json(file, entry)
    except OSError as error:
        raise UserError(f"the plan cannot be written to {file} ({error.strerror}); choose another place.") from error


def read_plan(file: Path, decoder: Decoder, model: str, backend: Backend) -> Plan:
    """The plan in `file`, checked against the checkpoint of content hash `model` and the backend that is to obey it.

    UserError, in one sentence that names the entry, for a file that is no plan, for linears that are missing or
    unknown, for ranks above the full one and for formats that the backend does not have.
    """
    found = _json(file)
    if type(found.get("version")) is not int or found["version"] != VERSION:
        raise UserError(
            f"{file} has plan version {str(found.get('version'))[:40]}, this casp reads {VERSION}; make it anew."
        )
    if found.get("backend") != backend.name:
        raise UserError(
            f"{file} is a plan for backend {str(found.get('backend'))[:40]!r}, not {backend.name!r}; make another."
        )
    if found.get("model") != model:
        raise UserError(f"{file} is a plan for another model than {decoder.folder}; make one for this model.")
    entries, wanted = found["linears"], shapes(decoder)
    for paths, what in ((wanted.keys() - entries.keys(), "lacks"), (entries.keys() - wanted.keys(), "names")):
        if paths:
            tail = "" if what == "lacks" else ", which this model does not have"
            raise UserError(f"{file} {what} {min(paths)[:200]}{tail}; correct the entry.")
    linears = {path: _option(file, path, entries[path], shape, backend) for path, shape in wanted.items()}
    record = found.get("record", {})
    return Plan(model, backend.name, decoder.original_weights(), linears, record if isinstance(record, dict) else {})


def shapes(decoder: Decoder) -> dict[str, tuple[int, int]]:
    """Path of every linear from the model's root -> (out, in)."""
    found = {}
    for index, block in enumerate(decoder.blocks):
        for path in decoder.linears(index).values():
            linear = decoder.block(index).get_submodule(path)
            found[f"{block}.{path}"] = (linear.out_features, linear.in_features)
    return found


def _json(file: Path) -> dict[str, Any]:
    if not is_there(Path(file)):
        raise UserError(f"--plan {file} does not exist; correct the name or make a plan with plan.sh.")
    found = read_json(Path(file), "the plan", remedy="correct it")
    if not isinstance(found.get("linears"), dict):
        raise UserError(f"--plan {file} holds no plan (an object with an entry 'linears'); give a plan.json.")
    return found


def _option(file: Path, path: str, entry: Any, shape: tuple[int, int], backend: Backend) -> Option:
    where = f"{file}, {path}"
    if not isinstance(entry, dict) or "rank" not in entry or not isinstance(entry.get("formats"), list):
        raise UserError(f"{where}: needs an entry 'rank' (a number or null) and a list 'formats'; correct it.")
    rank, formats = entry["rank"], entry["formats"]
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise UserError(f"{where}: rank {str(rank)[:40]} is neither null nor a whole number from 1; correct it.")
    if rank is not None and rank > min(shape):
        raise UserError(
            f"{where}: rank {str(rank)[:40]} is more than {min(shape)}, its full rank; lower it or write null."
        )
    needed = 1 if rank is None else 2
    if len(formats) != needed or not all(isinstance(format, dict) for format in formats):
        kind = "full rank takes one format" if rank is None else "a rank takes two formats, of down and of up"
        raise UserError(f"{where}: {kind}, not {len(formats)}; correct it.")
    for format, stored in zip(formats, stored_shapes(rank, *shape), strict=True):
        if reason := refused_format(format, stored, backend):
            shown = in_brief(ValueError(json.dumps(format)))
            raise UserError(f"{where}: format {shown} is refused ({reason}); correct it.")
    predicted = entry.get("predicted")
    cost = float(predicted) if isinstance(predicted, float) and math.isfinite(predicted) else 0.0
    return Option(rank, tuple(formats), option_bytes(backend, rank, formats, *shape), cost)


def refused_format(format: Any, shape: tuple[int, int], backend: Backend) -> str | None:
    """Why `backend` does not store a matrix of `shape` (out, in) in `format`; None where it does, as far as is known
    before it is done."""
    if not isinstance(format, dict):
        return "not an object"
    offered = [one for tuned in (False, True) for one in backend.formats(*shape, tuned=tuned)]
    kinds: dict[str, set[type]] = {}
    for one in offered:
        for key, value in one.items():
            kinds.setdefault(key, set()).update({type(value), int} if isinstance(value, float) else {type(value)})
    odd = next((key for key, value in format.items() if type(value) not in kinds.get(key, ())), None)
    if odd is not None:
        return f"{backend.name} has no such {odd[:40]!r}"
    try:
        backend.linear(*shape, False, format, device="meta")
        backend.bytes(format, *shape)
    except UserError as error:
        return str(error).rstrip(".")
    except Exception:  # of whatever a backend's arithmetic makes of other types
        return f"not a format of {backend.name}"
    return None
