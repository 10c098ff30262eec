"""accelerate's way to load: an empty model first, then the checkpoint into it, dispatched over devices."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from casp.model.split import Experts, SplitLinear, apply_splits
from casp.model.swap import describe_modules, in_model, swap_modules
from casp.reading.compression import check_compression


def prepare(model: nn.Module, compression: Mapping[str, Any]) -> None:
    """Give an empty `model` the modules that `compression`, its quantization_config, lists; twice is once."""
    check_compression(compression)
    splits = {in_model(model, path): spec for path, spec in compression.get("splits", {}).items()}
    apart = {path for path in splits if isinstance(model.get_submodule(path), Experts | SplitLinear)}
    apply_splits(model, {path: spec for path, spec in splits.items() if path not in apart})
    present = describe_modules(model)
    missing = {path: entry for path, entry in compression["modules"].items() if present.get(path) != entry}
    if missing:
        swap_modules(model, {**compression, "modules": missing})
