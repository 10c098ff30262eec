"""A view of any Hugging Face causal LM or multimodal model as blocks of linears, streamed from disk."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from casp import attention
from casp.errors import UserError
from casp.linear import LowRankLinear, QuantizedLinear
from casp.shards import Shards
from casp.swap import swap_modules

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
}
"""Leaf name of a linear -> its role in the method's words; a linear with another name keeps that name."""


def _open_config(folder: Path) -> object:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder (no config.json in it); correct --model.")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder}/config.json does not describe a model that transformers knows: {first_line}"
        ) from error


def _empty_model(config: object) -> PreTrainedModel:
    """The model of `config` with its parameters on meta and its non-stored buffers computed."""
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        factory = AutoModelForImageTextToText
    elif config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        factory = AutoModelForCausalLM
    else:
        raise UserError(
            f"model type {config.model_type!r} is neither a causal language model nor an image-text model; "
            "choose a model with a text decoder."
        )
    # Buffers are few and small, and those that are not stored (rotary frequencies) exist only by computing them.
    with init_empty_weights(include_buffers=False):
        return factory.from_config(config, attn_implementation=attention.NAME).eval()


def _find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the text decoder's blocks."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    depth = model.config.get_text_config().num_hidden_layers
    paths = {module: path for path, module in model.named_modules()}
    for module in decoder.modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == depth
        if is_list and any(isinstance(child, nn.Linear | QuantizedLinear) for child in module[0].modules()):
            return paths[module], module
    raise UserError(
        f"model type {model.config.model_type!r} has no decoder that CASP knows (a list of {depth} blocks of linear "
        "layers); models with fused or convolutional blocks are not supported."
    )


class Decoder:
    """A model's text decoder: its blocks, each block's linears by role, and everything else as the rest.

    The model lives on the meta device; `load_block` and `load_rest` read just that part from the shards,
    `unload_block` and `unload_rest` forget it again, so that memory holds one part at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config = _open_config(self.folder)
        quantization = getattr(self.config, "quantization_config", None)
        self.compression: dict | None = None
        if quantization is not None:
            quantization = quantization if isinstance(quantization, dict) else quantization.to_dict()
            if quantization.get("quant_method") != "casp":
                raise UserError(
                    f"{self.folder} is already quantized ({quantization.get('quant_method')}); "
                    "give the original checkpoint."
                )
            self.compression = quantization
        self.model = _empty_model(self.config)
        if self.compression is not None:
            swap_modules(self.model, self.compression)
        self.blocks_path, self.block_list = _find_blocks(self.model)
        self.shards = Shards(self.folder, self.model)
        fused = self.shards.converted(self.blocks_path + ".")
        if fused:
            raise UserError(f"{fused[0]} is stored in fused form, which CASP does not compress; choose a dense model.")
        if not self.linears(0):
            raise UserError(f"the blocks of model type {self.config.model_type!r} hold no linear layers to compress.")

    @classmethod
    def open(cls, folder: Path) -> "Decoder":
        """The decoder of the checkpoint in `folder`; UserError if it has none that CASP knows."""
        return cls(folder)

    @property
    def text_config(self) -> object:
        """The language model's part of the config."""
        return self.config.get_text_config()

    @property
    def is_multimodal(self) -> bool:
        """Whether the model takes images."""
        return self.text_config is not self.config

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
    def image_token_id(self) -> int | None:
        """The id that stands for one image token in `input_ids`, or None for a text model."""
        return getattr(self.config, "image_token_id", None) or getattr(self.config, "image_token_index", None)

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
        if self.compression is not None:
            return self.compression["original_weights"]
        total = 0
        for i in range(len(self.block_list)):
            for path in self.linears(i).values():
                linear = self.block(i).get_submodule(path)
                total += linear.in_features * linear.out_features
        return total

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
