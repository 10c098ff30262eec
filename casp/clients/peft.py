"""LoRA by PEFT on compressed layers: the adapter beside the packed weight, which stays as it is."""

from collections.abc import Callable
from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from casp.errors import UserError
from casp.linear import LowRankLinear, QuantizedLinear

COMPRESSED = (QuantizedLinear, LowRankLinear)
ALL_LINEAR = "all-linear"


class CompressedLoraLinear(LoraLinear):
    """`y = layer(x) + scaling * B A x`, layer being compressed: nothing can be merged into it."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        if getattr(config, "use_dora", False):
            raise UserError("DoRA scales the weight that an adapter belongs to, which a compressed layer has not.")
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        # PEFT would ask for the layer's weight, which is decoded for that.
        if device is None:
            device = next(iter(self.get_base_layer().state_dict().values())).device
        super()._move_adapter_to_device_of_base_layer(adapter_name, device=device)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # PEFT finds the same and warns of a layer that it does not know.
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """UserError: packed codes take no update."""
        raise UserError(
            "an adapter cannot be merged into compressed layers; save it, take model.dequantize() of the compressed "
            "model, and load and merge the adapter there."
        )


def _base(target: nn.Module) -> nn.Module:
    return target.get_base_layer() if isinstance(target, BaseTunerLayer) else target


def lora_layer(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module | None:
    """The LoRA layer around `target` where that is one of ours, else None; arguments as of PEFT's dispatchers."""
    if not isinstance(_base(target), COMPRESSED):
        return None
    known = ("r", "lora_alpha")
    return CompressedLoraLinear(
        target, adapter_name, config=lora_config, **{key: kwargs[key] for key in known if key in kwargs}
    )


def include_all_linear(original: Callable[[Any, nn.Module], Any], peft_config: Any, model: nn.Module) -> Any:
    """PEFT's own answer to target_modules="all-linear" with our layers in it, low-rank ones as a whole."""
    asked = getattr(peft_config, "target_modules", None)
    peft_config = original(peft_config, model)
    if not (isinstance(asked, str) and asked.lower() == ALL_LINEAR):
        return peft_config
    ours = [name for name, module in model.named_modules() if isinstance(module, COMPRESSED)]
    outermost = {name for name in ours if not any(name.startswith(other + ".") for other in ours)}
    inside = tuple(name + "." for name in outermost)
    dense = {name for name in peft_config.target_modules if not name.startswith(inside)}
    peft_config.target_modules = dense | outermost
    return peft_config
