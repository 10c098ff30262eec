"""Linears that a model keeps in one tensor, each in a module of its own: experts, and fused query, key and value.

What a model fuses is taken apart once, when its skeleton is opened; from then on every stage meets ordinary linears.
A compressed checkpoint stores the parts, and its config says under "splits" which modules to take apart again.
Experts are recognised by the interface that transformers gives them (`use_experts_implementation`), a fused projection
by its name and size.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from casp.errors import UserError

Take = Callable[[Tensor], Tensor]
"""One part of a fused tensor."""


@dataclass
class Fused:
    """A stored tensor that stands for several of the model's.

    shape: as it is stored; parts: the model's name of each part -> how it is taken from the whole.
    """

    shape: tuple[int, ...]
    parts: dict[str, Take] = field(default_factory=dict)


class Expert(nn.Module):
    """One expert: `down(act(gate_up(x)))`; rows: which of the layer's tokens were routed to it, in their order."""

    def __init__(self, gate_up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.rows: Tensor | None = None


class Experts(nn.Module):
    """The experts of one layer as linears, in the place of a module that holds them as 3-D tensors.

    fused: that module, whose activation is still asked for; its tensors are given up. A token's output is the sum of
    its experts', each weighted by the router.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        first = fused.gate_up_proj if fused.has_gate else fused.up_proj
        stored = (first, fused.down_proj)
        shapes = [tensor.shape[:0:-1] if fused.is_transposed else tensor.shape[1:] for tensor in stored]
        options = {"bias": fused.has_bias, "dtype": first.dtype, "device": "meta"}
        self.each = nn.ModuleList(
            Expert(*(nn.Linear(columns, rows, **options) for rows, columns in shapes)) for _ in range(len(first))
        )
        self.every = False
        for name in _tensors(fused):
            del fused._parameters[name]
        # Not a child: it has no weights left, and transformers would ask it for them where it initialises modules.
        object.__setattr__(self, "_fused", fused)

    def _activate(self, x: Tensor) -> Tensor:
        return self._fused._apply_gate(x) if self._fused.has_gate else self._fused.act_fn(x)

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """hidden_states (..., hidden); routing: (tokens, top k), the experts' numbers and their weights, in that order.

        Experts that no token goes to are passed over, unless `every` is set: then they are run on none, so that who
        watches a block sees all of its linears.
        """
        chosen, weights = (*routing, *named.values())
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.each):
            tokens, places = torch.where(chosen == number)
            if not len(tokens) and not self.every:
                continue
            expert.rows = tokens
            found = expert.down(self._activate(expert.gate_up(x[tokens])))
            out = out.index_add(0, tokens, (found * weights[tokens, places, None]).to(out.dtype))
            expert.rows = None
        return out.reshape(hidden_states.shape)


class SplitLinear(nn.Module):
    """A fused projection as one linear for each of its parts; puts out what the fused one would.

    parts: name -> rows of one group; groups: the fused rows are that many groups, each with the rows of all parts in
    their order (1: all of q, then all of k, then all of v; the number of heads: head by head).
    """

    def __init__(self, fused: nn.Linear, parts: Mapping[str, int], groups: int) -> None:
        super().__init__()
        self.in_features, self.out_features = fused.in_features, fused.out_features
        self.rows, self.groups = dict(parts), groups
        options = {"bias": fused.bias is not None, "dtype": fused.weight.dtype, "device": "meta"}
        for name, rows in parts.items():
            self.add_module(name, nn.Linear(fused.in_features, groups * rows, **options))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        made = [getattr(self, name)(x).unflatten(-1, (self.groups, rows)) for name, rows in self.rows.items()]
        return torch.cat(made, dim=-1).flatten(-2)


def _tensors(experts: nn.Module) -> dict[str, str]:
    """Name of each 3-D tensor of fused experts, and of its bias -> what is part of it in an `Expert`."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    names = {first: "gate_up.weight", "down_proj": "down.weight"}
    if experts.has_bias:
        names |= {f"{first}_bias": "gate_up.bias", "down_proj_bias": "down.bias"}
    return names


def _is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` holds its experts as 3-D tensors by transformers' interface, and nothing else."""
    if not hasattr(module, "is_transposed") or not hasattr(module, "has_gate") or module.has_post_expert_norm:
        return False
    if any(True for _ in module.buffers()) or not hasattr(module, "_apply_gate" if module.has_gate else "act_fn"):
        return False
    return {name for name, _ in module.named_parameters()} == set(_tensors(module))


def _heads(config: Any) -> tuple[int, int, int]:
    """Query heads, key and value heads, and the width of a head."""
    heads = config.num_attention_heads
    return (
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _one_after_another(config: Any) -> tuple[int, dict[str, int]]:
    heads, keys, width = _heads(config)
    return 1, {"q": heads * width, "k": keys * width, "v": keys * width}


def _head_by_head(config: Any) -> tuple[int, dict[str, int]]:
    heads, _, width = _heads(config)
    return heads, {"q": width, "k": width, "v": width}


def _falcon(config: Any) -> tuple[int, dict[str, int]]:
    heads, _, width = _heads(config)
    if config.new_decoder_architecture:
        groups = config.num_kv_heads
        return groups, {"q": heads // groups * width, "k": width, "v": width}
    if config.multi_query:
        return 1, {"q": heads * width, "k": width, "v": width}
    return _head_by_head(config)


LAYOUTS: dict[str, tuple[str, Callable[[Any], tuple[int, dict[str, int]]]]] = {
    "phi3": ("qkv_proj", _one_after_another),
    "phi4_multimodal": ("qkv_proj", _one_after_another),
    "gpt_neox": ("query_key_value", _head_by_head),
    "bloom": ("query_key_value", _head_by_head),
    "falcon": ("query_key_value", _falcon),
}
"""Model type -> leaf name of its fused projection and how its rows are laid out (groups, rows of each part)."""


def find_splits(model: nn.Module, blocks: tuple[str, nn.Module] | None) -> dict[str, dict[str, Any]]:
    """What of a model's decoder can be taken apart: path from the model's root -> its description, JSON-able.

    blocks: path and list of the decoder's blocks. {"experts": n}, or {"parts": {"q": rows, ...}, "groups": n}.
    """
    found: dict[str, dict[str, Any]] = {}
    if blocks is None:
        return found
    config = model.config.get_text_config()
    leaf, layout = LAYOUTS.get(config.model_type, (None, None))
    for path, module in blocks[1].named_modules(prefix=blocks[0]):
        if _is_fused_experts(module):
            found[path] = {"experts": len(module.down_proj)}
        elif isinstance(module, nn.Linear) and path.rpartition(".")[2] == leaf:
            groups, parts = layout(config)
            if groups * sum(parts.values()) == module.out_features:
                found[path] = {"parts": parts, "groups": groups}
    return found


def apply_splits(model: nn.Module, splits: Mapping[str, Mapping[str, Any]]) -> dict[str, Fused]:
    """Take apart, in place, what `splits` names; returns the fused tensors by their names in the model.

    The parts are on the meta device. UserError where the model has no such module or it is of another size.
    """
    fused: dict[str, Fused] = {}
    for path, spec in splits.items():
        parent, _, leaf = path.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise UserError(f"the checkpoint's config takes {path} apart, which this model does not have.") from None
        if "experts" in spec:
            if not _is_fused_experts(module) or len(module.down_proj) != spec["experts"]:
                raise UserError(f"{path} is not made of {spec['experts']} experts; the checkpoint's config is damaged.")
            fused |= _fused_experts(module, path)
            new: nn.Module = Experts(module)
        else:
            parts, groups = spec["parts"], spec["groups"]
            if not isinstance(module, nn.Linear) or groups * sum(parts.values()) != module.out_features:
                raise UserError(f"{path} has no parts as its config says; the checkpoint's config is damaged.")
            fused |= _fused_rows(module, path, parts, groups)
            new = SplitLinear(module, parts, groups)
        setattr(model.get_submodule(parent), leaf, new)
    return fused


def _fused_experts(module: nn.Module, path: str) -> dict[str, Fused]:
    found = {}
    for name, part in _tensors(module).items():
        turned = module.is_transposed and part.endswith("weight")
        tensor = getattr(module, name)
        found[f"{path}.{name}"] = whole = Fused(tuple(tensor.shape))
        for number in range(len(tensor)):
            whole.parts[f"{path}.each.{number}.{part}"] = lambda t, number=number, turned=turned: (
                t[number].T if turned else t[number]
            ).clone(memory_format=torch.contiguous_format)
    return found


def _fused_rows(module: nn.Linear, path: str, parts: Mapping[str, int], groups: int) -> dict[str, Fused]:
    found = {}
    for name, tensor in module.named_parameters():
        found[f"{path}.{name}"] = whole = Fused(tuple(tensor.shape))
        first = 0
        for part, rows in parts.items():
            place = slice(first, first + rows)
            whole.parts[f"{path}.{part}.{name}"] = lambda t, place=place: (
                t.unflatten(0, (groups, -1))[:, place].flatten(0, 1).clone(memory_format=torch.contiguous_format)
            )
            first += rows
    return found


def joined(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state`, tensors by their names in `model`, with the dense parts of what was taken apart put together again.

    The names and shapes are then those of the model as transformers has it. Parts that `state` lacks stay as they are.
    """
    found = dict(state)
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            for name, part in _tensors(module._fused).items():
                parts = [f"{path}.each.{number}.{part}" for number in range(len(module.each))]
                if all(one in found for one in parts):
                    turned = module._fused.is_transposed and part.endswith("weight")
                    tensors = [found.pop(one) for one in parts]
                    found[f"{path}.{name}"] = torch.stack([t.T if turned else t for t in tensors])
        elif isinstance(module, SplitLinear):
            for name in ("weight", "bias"):
                parts = [f"{path}.{part}.{name}" for part in module.rows]
                if all(one in found for one in parts):
                    tensors = [found.pop(one).unflatten(0, (module.groups, -1)) for one in parts]
                    found[f"{path}.{name}"] = torch.cat(tensors, dim=1).flatten(0, 1)
    return found


def expert_of(block: nn.Module, path: str) -> Expert | None:
    """The expert that the module at `path` of `block` is part of."""
    module = block
    for name in path.split("."):
        if isinstance(module, Expert):
            return module
        module = getattr(module, name)
    return None


def pool_of(path: str) -> str | None:
    """What the paths of one place in all experts of a layer have in common; None for a path outside of experts."""
    pool, found = re.subn(r"\.each\.\d+\.", ".each.*.", path)
    return pool if found else None


def side_by_side(groups: Sequence[list[str]]) -> list[list[list[str]]]:
    """Groups of linears that share an input, in the order of computation -> those that may be seen at the same time.

    The same place of all experts of a layer is one entry: none of them reads what another puts out.
    """
    found: dict[str, list[list[str]]] = {}
    for group in groups:
        found.setdefault(pool_of(group[0]) or group[0], []).append(group)
    return list(found.values())


@contextmanager
def every_expert(block: nn.Module) -> Iterator[None]:
    """While open, all experts in `block` run, those too that no token goes to."""
    layers = [module for module in block.modules() if isinstance(module, Experts)]
    for layer in layers:
        layer.every = True
    try:
        yield
    finally:
        for layer in layers:
            layer.every = False
            for expert in layer.each:
                expert.rows = None  # a replay that ended early leaves them
