"""Putting compressed modules in the place of a model's linears, as `quantization_config` describes them."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from casp.backend import load_backend
from casp.errors import UserError, told_as
from casp.linear import LowRankLinear, QuantizedLinear

ModelT = TypeVar("ModelT", bound=nn.Module)


def in_model(model: nn.Module, path: str) -> str:
    """`path`, recorded from the full model, as `model` has it; UserError where it has no such module."""
    parent, leaf = find_module(model, path)
    return next(name for name, module in model.named_modules() if module is parent.get_submodule(leaf))


def find_module(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Parent and leaf name of the module at `path`.

    Paths are recorded from the full model; a bare base model (AutoModel) lacks the first part of them.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (path, path.removeprefix(prefix + "."), f"{prefix}.{path}"):
        parent, _, leaf = candidate.rpartition(".")
        try:
            module = model.get_submodule(parent)
            module.get_submodule(leaf)
        except AttributeError:
            continue
        return module, leaf
    raise UserError(f"the checkpoint's quantization_config names {path}, which this model does not have.")


def swap_modules(model: nn.Module, compression: Mapping[str, Any]) -> None:
    """Replace, in place, every module that `compression["modules"]` lists, by an empty compressed one.

    An entry {"rank": r} asks for a LowRankLinear, {"format": {...}} for the backend's linear. A quantized
    low-rank layer has three entries: its own and one for each of its factors.
    """
    modules = compression["modules"]
    backend = load_backend(compression["backend"]) if any("format" in entry for entry in modules.values()) else None
    # A low-rank layer must stand before its factors can be replaced.
    # transformers swaps where new tensors are on the meta device; a layer's constants must hold their values.
    with torch.device("cpu"):
        for path, entry in sorted(modules.items(), key=lambda item: "format" in item[1]):
            parent, leaf = find_module(model, path)
            old = parent.get_submodule(leaf)
            if isinstance(old, LowRankLinear) and entry == {"rank": old.rank}:
                continue
            if not isinstance(old, nn.Linear):
                raise UserError(f"{path} is a {type(old).__name__}, not a linear; the checkpoint's config is damaged.")
            if entry.get("rank", 1) > min(old.in_features, old.out_features):
                raise UserError(
                    f"quantization_config gives {path} the rank {entry['rank']}, more than its size allows; the "
                    "checkpoint's config is damaged: make or download it again."
                )
            bias, like = old.bias is not None, {"dtype": old.weight.dtype, "device": old.weight.device}
            if "rank" in entry:
                new = LowRankLinear(old.in_features, old.out_features, entry["rank"], bias, **like)
            else:
                with told_as(f"{path} has a format that {backend.name} does not know", "make the checkpoint again"):
                    new = backend.linear(old.out_features, old.in_features, bias, entry["format"], **like)
            setattr(parent, leaf, new)


def describe_modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The `modules` entry of a quantization_config for the compressed modules that `model` holds."""
    entries: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            entries[path] = {"rank": module.rank}
        elif isinstance(module, QuantizedLinear):
            entries[path] = {"format": module.format}
    return entries


@torch.no_grad()
def to_dense(model: ModelT, dtype: torch.dtype) -> ModelT:
    """`model` with a dense linear in `dtype` in the place of every compressed module, one at a time."""
    for path in [path for path, module in model.named_modules() if isinstance(module, LowRankLinear | QuantizedLinear)]:
        try:
            old = model.get_submodule(path)
        except AttributeError:
            continue  # a factor of a low-rank linear that is dense already
        weight = old.weight.to(dtype)
        new = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
        new.weight = nn.Parameter(weight, requires_grad=False)
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach().to(dtype), requires_grad=False)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return model


def module_bytes(module: nn.Module) -> int:
    """Bytes of a linear's stored tensors (dense, low-rank or quantized), its bias not counted."""
    stored = {name: tensor for name, tensor in module.state_dict().items() if name.rpartition(".")[2] != "bias"}
    return sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
