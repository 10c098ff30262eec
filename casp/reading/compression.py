"""What config.json says of a compression, checked before a module is built from it."""

from collections.abc import Mapping
from typing import Any

from casp.errors import UserError

FORMAT_VERSION = 2
"""1: every entry of `modules` is a linear of the model; 2: some are parts of what `splits` takes apart."""
WEIGHTS_KEY = "transformers_weights"
INSTEAD_OF_WEIGHTS = "install the Python package casp to read these weights.safetensors"
"""What config.json gives as `WEIGHTS_KEY`, the file that transformers is to read. There is no such file: where CASP is
not installed, transformers, which only warns of quantization methods that it does not know and goes on with random
numbers, ends with this name; where it is, `casp.model.checkpoint` takes the entry out before files are looked for."""
_DAMAGED = "the checkpoint's config is damaged: make or download it again"


def check_compression(found: Mapping[str, Any]) -> None:
    """UserError unless `found`, the quantization_config of a CASP checkpoint, has the form that is written here."""
    version, backend = found.get("version", 1), found.get("backend")
    if type(version) is not int or version < 1:
        raise UserError(f"quantization_config has the version {str(version)[:40]}; {_DAMAGED}.")
    if version > FORMAT_VERSION:
        raise UserError(
            f"this checkpoint has format version {version}, this casp reads up to {FORMAT_VERSION}; update casp."
        )
    if backend is not None and not isinstance(backend, str):
        raise UserError(f"quantization_config names no backend; {_DAMAGED}.")
    weights, modules = found.get("original_weights"), found.get("modules")
    if type(weights) is not int or weights < 1:
        raise UserError(f"quantization_config has {str(weights)[:40]} as original_weights; {_DAMAGED}.")
    if not isinstance(modules, dict) or not modules:
        raise UserError(f"quantization_config lists no modules; {_DAMAGED}.")
    for path, entry in modules.items():
        if not isinstance(entry, dict) or len(entry) != 1:
            raise UserError(f"quantization_config does not say how {path} is stored; {_DAMAGED}.")
        has_rank = type(entry.get("rank")) is int and entry["rank"] >= 1
        if not has_rank and not (isinstance(entry.get("format"), dict) and isinstance(backend, str)):
            raise UserError(f"quantization_config gives {path} no valid rank or format; {_DAMAGED}.")
    splits = found.get("splits", {})
    if not isinstance(splits, dict) or not all(_is_split(spec) for spec in splits.values()):
        raise UserError(f"quantization_config does not say how its splits are made; {_DAMAGED}.")


def _is_split(spec: Any) -> bool:
    def count(value: Any) -> bool:
        return type(value) is int and 1 <= value < 1 << 31

    if not isinstance(spec, dict):
        return False
    if spec.keys() == {"experts"}:
        return count(spec["experts"])
    if spec.keys() != {"parts", "groups"} or not isinstance(spec["parts"], dict) or not spec["parts"]:
        return False
    return count(spec["groups"]) and all(name.isidentifier() and count(rows) for name, rows in spec["parts"].items())
