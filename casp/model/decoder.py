"""A view of any Hugging Face causal LM or multimodal model as blocks of linears, streamed from disk."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from casp.errors import UserError, told_as
from casp.linear import LowRankLinear, QuantizedLinear
from casp.model import attention
from casp.model.modality import is_multimodal
from casp.model.shards import Shards, read_entries
from casp.model.split import apply_splits, find_splits
from casp.model.swap import swap_modules
from casp.reading.compression import check_compression
from casp.reading.config import open_config, quantization_of
from casp.reading.header import Entry

ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "fc1": "up",
    "fc2": "down",
    "dense": "o",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
}
"""Leaf name of a linear -> its role in the method's words; a linear with another name keeps that name."""

LEAST_SHARE = 0.9
"""Of a decoder's weights: where fewer are linears, bits per weight would say little about the model's size."""


def _factory(config: Any) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The class of transformers that makes the model of `config`; UserError for one without a text decoder."""
    if is_multimodal(config):
        return AutoModelForImageTextToText
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    raise UserError(
        f"model type {config.model_type!r} is neither a causal language model nor an image-text model; "
        "choose a model with a text decoder."
    )


def _empty_model(config: Any) -> PreTrainedModel:
    """The model of `config` with its parameters on meta and its non-stored buffers computed."""
    # Buffers are few and small, and those that are not stored (rotary frequencies) exist only by computing them.
    with (
        init_empty_weights(include_buffers=False),
        told_as("no model can be made of what config.json says", "download or write it again"),
    ):
        factory = _factory(config)
        kind = factory._model_mapping[type(config)]
        watched = attention.NAME if kind._supports_attention_backend else "eager"
        return factory.from_config(config, attn_implementation=watched, trust_remote_code=False).eval()


def _check_depth(folder: Path, config: Any, entries: Mapping[str, Entry]) -> None:
    """UserError where the config asks for more blocks than are stored, before that many are made."""
    stored = max((int(number) + 1 for name in entries for number in re.findall(r"\.(\d{1,9})\.", name)), default=0)
    asked = config.get_text_config().num_hidden_layers
    if asked > stored:
        raise UserError(
            f"the config in {folder} asks for {asked} blocks, its weights hold {stored}; config.json and the weights do"
            " not belong together."
        )


@dataclass(frozen=True)
class Skeleton:
    """What a checkpoint's config describes, on the meta device, beside what is stored of it.

    compression: the quantization_config of a CASP checkpoint, whose modules then stand in the model; None for a plain
    model. splits: what of the model was taken apart, see `casp.model.split`.
    """

    config: Any
    compression: dict[str, Any] | None
    splits: dict[str, dict[str, Any]]
    model: PreTrainedModel
    shards: Shards


def open_skeleton(folder: Path) -> Skeleton:
    """The skeleton of a plain or a CASP checkpoint; UserError for one that something else quantized."""
    config = open_config(folder)
    compression = quantization_of(config) or None
    if compression is not None:
        if compression["quant_method"] != "casp":
            raise UserError(
                f"{folder} is already quantized ({compression['quant_method']}); give the original checkpoint."
            )
        check_compression(compression)
    _factory(config)
    entries = read_entries(folder)
    _check_depth(folder, config, entries)
    model = _empty_model(config)
    if compression is None:
        splits = find_splits(model, decoder_blocks(model))
        return Skeleton(config, None, splits, model, Shards(entries, model, apply_splits(model, splits)))
    splits = compression.get("splits", {})
    apply_splits(model, splits)
    swap_modules(model, compression)
    return Skeleton(config, compression, splits, model, Shards(entries, model))


def check_weights(folder: Path) -> None:
    """UserError unless the weights of a plain or CASP checkpoint are what its config describes; reads no data.

    For models that are run as they are; a `Decoder`, which asks for more, checks the same.
    """
    skeleton = open_skeleton(folder)
    if skeleton.compression is not None:
        Decoder(folder)  # what was compressed has a decoder, and its record of original weights is checked there
        return
    found = decoder_blocks(skeleton.model)
    skeleton.shards.check(folder, None if found is None else found[0])


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """Path and list of the text decoder's blocks; None where no list of linears is as long as the config says."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    depth = model.config.get_text_config().num_hidden_layers
    paths = {module: path for path, module in model.named_modules()}
    for module in decoder.modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == depth
        if is_list and any(isinstance(child, nn.Linear | QuantizedLinear) for child in module[0].modules()):
            return paths[module], module
    return None


def _find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """As `decoder_blocks`; UserError for a model that has none."""
    found = decoder_blocks(model)
    if found is None:
        raise UserError(
            f"model type {model.config.model_type!r} has no decoder that CASP knows (a list of "
            f"{model.config.get_text_config().num_hidden_layers} blocks of linear layers); models with fused or "
            "convolutional blocks are not supported."
        )
    return found


class Decoder:
    """A model's text decoder: its blocks, each block's linears by role, and everything else as the rest.

    The model lives on the meta device; `load_block` and `load_rest` read just that part from the shards,
    `unload_block` and `unload_rest` forget it again, so that memory holds one part at a time.
    """

    def __init__(self, folder: Path) -> None:
        """Of the checkpoint in `folder`; UserError if it has no decoder that CASP knows."""
        self.folder = Path(folder)
        skeleton = open_skeleton(self.folder)
        self.config, self.compression = skeleton.config, skeleton.compression
        self.model, self.shards, self.splits = skeleton.model, skeleton.shards, skeleton.splits
        self.blocks_path, self.block_list = _find_blocks(self.model)
        if not self.linears(0):
            raise UserError(f"the blocks of model type {self.config.model_type!r} hold no linear layers to compress.")
        self.shards.check(self.folder, self.blocks_path)
        if self.compression is not None and self.compression["original_weights"] != self.original_weights():
            raise UserError(
                f"{self.folder} records {self.compression['original_weights']} original weights, its linears stand for "
                f"{self.original_weights()}; make or download the checkpoint again."
            )

    def holds(self, kind: type[nn.Module]) -> bool:
        """Whether a linear of the blocks is a `kind`."""
        return any(isinstance(module, kind) for block in self.block_list for module in block.modules())

    @property
    def shows_attention(self) -> bool:
        """Whether the attention of the blocks can be watched: older models of transformers compute their own."""
        return self.model._supports_attention_backend

    @property
    def text_config(self) -> object:
        """The language model's part of the config."""
        return self.config.get_text_config()

    @property
    def is_multimodal(self) -> bool:
        """Whether the model takes images."""
        return is_multimodal(self.config)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states between blocks."""
        return self.text_config.hidden_size

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.text_config.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Number of key/value heads (grouped-query attention has fewer than query heads)."""
        return getattr(self.text_config, "num_key_value_heads", None) or self.heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return getattr(self.text_config, "head_dim", None) or self.hidden_size // self.heads

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the checkpoint stores its weights in."""
        return self.config.dtype or torch.float32

    @property
    def blocks(self) -> list[str]:
        """Module paths of the blocks, in order."""
        return [f"{self.blocks_path}.{i}" for i in range(len(self.block_list))]

    def block(self, index: int) -> nn.Module:
        """The module of block `index`; its weights are on meta unless loaded."""
        return self.block_list[index]

    def linears(self, index: int, factors: bool = False) -> dict[str, str]:
        """Role -> path relative to the block, of every linear of block `index` in the order of the module.

        A low-rank linear is one entry, or with `factors` its two: roles "q.down" and "q.up".
        """
        found: dict[str, str] = {}
        inside: list[str] = []
        for path, module in self.block(index).named_modules():
            if any(path.startswith(prefix + ".") for prefix in inside):
                continue
            if not isinstance(module, nn.Linear | LowRankLinear | QuantizedLinear):
                continue
            inside.append(path)
            leaf = path.rpartition(".")[2]
            role = ROLES.get(leaf, leaf)
            role = role if role not in found else path
            if isinstance(module, LowRankLinear) and factors:
                found[role + ".down"], found[role + ".up"] = path + ".down", path + ".up"
            else:
                found[role] = path
        return found

    def original_weights(self) -> int:
        """Number of weights that the decoder's linears had in the original model."""
        return self._weights()[0]

    def block_weights(self, index: int) -> int:
        """The same of one block: what work on it costs, in units that all blocks share."""
        modules = map(self.block(index).get_submodule, self.linears(index).values())
        return sum(module.in_features * module.out_features for module in modules)

    def _weights(self) -> tuple[int, int]:
        """Weights of all linears in the original model, and of all matrices and larger tensors beside them."""
        linears = others = 0
        for i in range(len(self.block_list)):
            found = tuple(self.linears(i).values())
            modules = [self.block(i).get_submodule(path) for path in found]
            linears += sum(module.in_features * module.out_features for module in modules)
            inside = {tensor for module in modules for tensor in module.parameters()}
            others += sum(p.numel() for p in self.block(i).parameters() if p.dim() > 1 and p not in inside)
        return linears, others

    def share(self) -> float:
        """Share of the weights of the blocks (matrices and larger tensors) that are linears, which stages compress."""
        linears, others = self._weights()
        return linears / (linears + others)

    def require_share(self, partial: bool) -> float:
        """`share`, printed; UserError where it is below `LEAST_SHARE`, unless `partial` says that this is all right."""
        share = self.share()
        print(f"{share:.1%} of the weights in the decoder's blocks are linears, which are compressed")
        if share < LEAST_SHARE and not partial:
            raise UserError(
                f"{self.folder}: CASP finds only {share:.1%} of the decoder's weights in linears and would leave the "
                f"rest of model type {self.config.model_type!r} as it is; choose another model, or compress that part "
                "with --allow-partial."
            )
        return share

    def _load(self, names: list[str], device: torch.device, dtype: torch.dtype) -> None:
        parameters = dict(self.model.named_parameters())
        buffers = dict(self.model.named_buffers())
        for name, tensor in self.shards.load(names):
            if name not in parameters and name not in buffers:
                continue
            is_parameter = name in parameters
            expected = parameters[name] if is_parameter else buffers[name]
            if expected.shape != tensor.shape:
                raise UserError(
                    f"{name} in {self.folder} has shape {tuple(tensor.shape)} where the config asks for "
                    f"{tuple(expected.shape)}; config.json and the weights do not belong together."
                )
            # Packed buffers keep the dtype they are stored in: it is part of the format.
            wanted = dtype if is_parameter and tensor.is_floating_point() else tensor.dtype
            self._set(name, tensor.to(device=device, dtype=wanted), is_parameter)

    def _set(self, name: str, tensor: Tensor, is_parameter: bool) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if is_parameter:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor

    def _require_loaded(self, module: nn.Module, prefix: str, ignore: Callable[[str], bool]) -> None:
        missing = [
            prefix + name
            for name, tensor in module.state_dict().items()
            if tensor.is_meta and not ignore(prefix + name)
        ]
        if missing:
            raise UserError(
                f"{self.folder} lacks {missing[0]}"
                + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
                + " that its config asks for; download or write the checkpoint again."
            )

    def load_block(self, index: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Read block `index` from the shards: parameters in `dtype`, buffers as stored."""
        prefix = self.blocks[index] + "."
        self._load(self.shards.names(prefix), device, dtype)
        block = self.block(index)
        self._require_loaded(block, prefix, lambda name: False)
        return block.to(device)

    def unload_block(self, index: int) -> None:
        """Forget the weights of block `index`."""
        _forget(self.block(index))

    def rest_names(self) -> list[str]:
        """The model's names of everything stored outside the blocks."""
        return [name for name in self.shards.names("") if not name.startswith(self.blocks_path + ".")]

    def load_rest(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read everything outside the blocks: embeddings, vision tower, projector, norm, head."""
        self._load(self.rest_names(), device, dtype)
        tied = self.model.all_tied_weights_keys
        for target, source in tied.items():
            path, _, leaf = target.rpartition(".")
            self.model.get_submodule(path)._parameters[leaf] = self.model.get_parameter(source)
        blocks = self.blocks_path + "."
        self._require_loaded(self.model, "", lambda name: name.startswith(blocks))
        for name, module in self.model.named_modules():
            if not (name + ".").startswith(blocks):
                for leaf, buffer in module.named_buffers(recurse=False):
                    module._buffers[leaf] = buffer.to(device)

    def unload_rest(self) -> None:
        """Forget the weights outside the blocks."""
        blocks = set(self.block_list.modules())
        for module in self.model.modules():
            if module not in blocks:
                _forget(module, recurse=False)


def _forget(root: nn.Module, recurse: bool = True) -> None:
    for module in root.modules() if recurse else [root]:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for name, buffer in module._buffers.items():
            # Buffers that are not stored could not be read back; they are small and stay.
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to("meta")
