"""Compressed checkpoints: ordinary Hugging Face folders whose config says how each linear is stored.

Importing this module registers quant_method "casp" with transformers; where CASP is installed a hook at start-up
(`casp_entry.hook`) does so when a checkpoint asks for it. Then
`AutoModelForCausalLM.from_pretrained(folder)` and `AutoModelForImageTextToText.from_pretrained(folder)`
build the compressed modules on the meta device and read the packed tensors into them, so that memory holds
what the disk holds. `save_pretrained` writes the same format again.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from casp.errors import UserError
from casp.linear import LowRankLinear, QuantizedLinear, is_finite
from casp.model.decoder import Decoder, decoder_blocks
from casp.model.shards import Shards
from casp.model.split import Experts, SplitLinear, apply_splits, joined
from casp.model.swap import describe_modules, in_model, swap_modules, to_dense
from casp.reading.compression import WEIGHTS_KEY, check_compression
from casp.reading.header import read_header

QUANT_METHOD = "casp"
COMPRESSED = (QuantizedLinear, LowRankLinear)

AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)  # the stand-in of the start-up hook


@register_quantization_config(QUANT_METHOD)
class CaspConfig(QuantizationConfigMixin):
    """The `quantization_config` of a CASP checkpoint.

    backend: name of the quantizer, None when only low-rank factors were made; original_weights: number of
    weights that the decoder's linears had before any compression (the denominator of bits per weight);
    modules: module path -> {"rank": int} or {"format": {...}}; splits: what is taken apart first (`casp.model.split`).
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]],
        original_weights: int,
        backend: str | None = None,
        version: int = 1,
        splits: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.version = version
        self.backend = backend
        self.original_weights = original_weights
        self.modules = modules
        self.splits = splits or {}

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as it stands in config.json."""
        keys = ("quant_method", "version", "backend", "original_weights", "modules")
        return {key: getattr(self, key) for key in keys} | ({"splits": self.splits} if self.splits else {})


def _sign(model: nn.Module) -> str:
    """The name that the weight of the first compressed module has in the dense model.

    Parts of what is taken apart have none there; they serve where there is nothing else.
    """
    compressed = [path for path, module in model.named_modules() if isinstance(module, COMPRESSED)]
    split = tuple(path + "." for path, module in model.named_modules() if isinstance(module, SplitLinear | Experts))
    return next((path for path in compressed if not path.startswith(split)), compressed[0]) + ".weight"


def _save_joined(model: PreTrainedModel, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
    """`save_pretrained` of a dense model in parts: its files hold the fused tensors that stock transformers reads.

    While it saves, memory holds these beside the parts. The model stays in parts, since adapters know those by name.
    """
    given = model.state_dict() if state_dict is None else state_dict
    state = joined(model, given)
    # transformers asks the model for the shape of a tensor that it converts: while it saves, the wholes are there.
    wholes = [name.rpartition(".") for name in state.keys() - given.keys()]
    for path, _, leaf in wholes:
        shape = nn.Parameter(state[f"{path}.{leaf}"].to("meta"), requires_grad=False)
        model.get_submodule(path).register_parameter(leaf, shape)
    try:
        return type(model).save_pretrained(model, *args, state_dict=state, **kwargs)
    finally:
        for path, _, leaf in wholes:
            delattr(model.get_submodule(path), leaf)


@register_quantizer(QUANT_METHOD)
class CaspQuantizer(HfQuantizer):
    """Builds the compressed modules before transformers reads the tensors into them."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config.to_dict()
        check_compression(config)
        apply_splits(model, {in_model(model, path): spec for path, spec in self.quantization_config.splits.items()})
        swap_modules(model, config)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, f"^{re.escape(_sign(model))}$"}
        # Of tensors that are missing or of another kind transformers warns, and goes on with random or cast numbers.
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        if files:
            entries = {name: entry for file in files for name, entry in read_header(file).items()}
            paths = [path for path, module in model.named_modules() if isinstance(module, COMPRESSED)]
            blocks = decoder_blocks(model)
            if blocks is not None:
                paths.append(blocks[0])
            Shards(entries, model).check(files[0].parent, within=tuple(path + "." for path in paths))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for path, module in model.named_modules():
            if isinstance(module, COMPRESSED):
                for name, tensor in module.state_dict().items():
                    if not tensor.is_meta and not is_finite(tensor):
                        raise UserError(f"{path}.{name} holds NaN or infinity; make or download the checkpoint again.")

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Called with the model's config before its files are looked for: the weights are where they always are."""
        config.__dict__.pop(WEIGHTS_KEY, None)
        return config

    update_tp_plan = update_attn_implementation  # what is called there by transformers before 5.21

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Dense linears in the place of all compressed modules, in `dtype` (default: the model's)."""
        dense = to_dense(model, dtype or model.dtype)
        if any(isinstance(module, SplitLinear | Experts) for module in dense.modules()):
            dense.save_pretrained = MethodType(_save_joined, dense)
        return dense

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the modules as they are, and a sign that stock transformers refuses.

        `save_pretrained` drops the config's key that does so in the checkpoints made here. The sign is an empty tensor
        with the name of a dense weight, whose shape is then told to be wrong.
        """
        self.quantization_config.modules = describe_modules(model)
        return {**model.state_dict(), _sign(model): torch.empty(0)}, {}

    def is_serializable(self) -> bool:
        """save_pretrained writes the compressed modules as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters, prompts and whatever stands beside the compressed modules can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Packed codes do not train; low-rank factors alone do, without adapters."""
        return self.quantization_config.backend is None


@dataclass(frozen=True)
class Size:
    """What the decoder's linears take on disk: bytes, the original model's weights, and their ratio in bits."""

    bytes: int
    original_weights: int

    @property
    def bpw(self) -> float:
        """Bits per original weight, every overhead counted (scales, zeros, codebooks, factors; no biases)."""
        return 8 * self.bytes / self.original_weights


def size(folder: Path) -> Size:
    """Exact size on disk of the decoder's linears of a plain or a CASP checkpoint, from the shards' headers."""
    decoder = Decoder(folder)
    total = sum(stored_bytes(decoder, index) for index in range(len(decoder.blocks)))
    return Size(total, decoder.original_weights())


def stored_bytes(decoder: Decoder, index: int) -> int:
    """Bytes that the checkpoint stores for the linears of block `index`, biases left out."""
    prefix = decoder.blocks[index] + "."
    linears = set(decoder.linears(index).values())
    stored: set[str] = set()  # a tensor that holds several linears counts once
    for name in decoder.shards.names(prefix):
        parents = name.removeprefix(prefix).split(".")
        inside = any(".".join(parents[:depth]) in linears for depth in range(1, len(parents)))
        if inside and not name.endswith(".bias"):
            stored.update(decoder.shards.stored_names(name))
    return sum(decoder.shards.entries[one].bytes for one in stored)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers that `model` holds in memory; tied tensors counted once."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()] if t.numel()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
