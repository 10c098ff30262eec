"""The libraries that open checkpoints learn of ours by CASP being installed.

A `.pth` file beside the installed packages (`entry/start.py`) waits in every Python process of the environment, unless
CASP_NO_HOOK is set, for the import of one of `MODULES` and then asks here. What is put into those modules is small and
imports `casp` not before a compressed checkpoint is met:

- transformers gets a stand-in for the quantization method "casp" (its own registry; `casp.model.checkpoint` replaces
  it);
- accelerate's `load_checkpoint_and_dispatch` and `load_checkpoint_in_model` have no registry: they are wrapped so that
  an empty model whose config says "casp" gets its compressed modules first;
- PEFT's list of LoRA dispatchers and of what "all-linear" means are closed: they are wrapped so that they know ours.
"""

import functools
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

QUANT_METHOD = "casp"


class StandIn:
    """Stands for `casp.model.checkpoint.CaspConfig` among transformers' quantization configs until it is asked for."""

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """The real config of the same dictionary."""
        from casp.model.checkpoint import CaspConfig

        return CaspConfig.from_dict(*args, **kwargs)


def _transformers(module: ModuleType) -> None:
    getattr(module, "AUTO_QUANTIZATION_CONFIG_MAPPING", {}).setdefault(QUANT_METHOD, StandIn)


def _accelerate(module: ModuleType) -> None:
    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load(model: Any, *args: Any, **kwargs: Any) -> Any:
            found = getattr(getattr(model, "config", None), "quantization_config", None)
            if isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD:
                from casp.clients.accelerate import prepare

                prepare(model, found)
            return original(model, *args, **kwargs)

        return load

    for name in ("load_checkpoint_and_dispatch", "load_checkpoint_in_model"):
        if hasattr(module, name):
            setattr(module, name, around(getattr(module, name)))


def _peft_targets(module: ModuleType) -> None:
    original = getattr(module, "_maybe_include_all_linear_layers", None)
    if original is None:
        return

    @functools.wraps(original)
    def include(peft_config: Any, model: Any) -> Any:
        if "casp.linear" not in sys.modules:  # no layer of ours can be there
            return original(peft_config, model)
        from casp.clients.peft import include_all_linear

        return include_all_linear(original, peft_config, model)

    module._maybe_include_all_linear_layers = include


def _peft_layers(module: ModuleType) -> None:
    original = getattr(getattr(module, "LoraModel", None), "_create_new_module", None)
    if original is None:
        return

    @functools.wraps(original)
    def create(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        if "casp.linear" in sys.modules:
            from casp.clients.peft import lora_layer

            layer = lora_layer(lora_config, adapter_name, target, **kwargs)
            if layer is not None:
                return layer
        return original(lora_config, adapter_name, target, **kwargs)

    module.LoraModel._create_new_module = staticmethod(create)


MODULES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.quantizers.auto": _transformers,
    "accelerate.big_modeling": _accelerate,
    "peft.tuners.tuners_utils": _peft_targets,
    "peft.tuners.lora.model": _peft_layers,
}
"""Module -> what is done with it after it has been executed. `entry/start.py` has the same names."""


def spec_with_sequel(name: str, path: Any, target: Any) -> ModuleSpec | None:
    """The own spec of a module of `MODULES`, with a loader that does what stands there after the module's code."""
    spec = PathFinder.find_spec(name, path, target)
    if spec is not None and spec.loader is not None:
        loader = spec.loader
        execute = loader.exec_module

        def execute_and_more(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            MODULES[name](module)

        loader.exec_module = execute_and_more
    return spec
