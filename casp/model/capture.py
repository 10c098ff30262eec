"""Running a model once with its blocks passed over, to record what each block is called with."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from casp.errors import UserError, told_as
from casp.model.attention import NAME
from casp.model.batch import answers_of
from casp.model.decoder import Decoder
from casp.model.inputs import BatchInputs, PassedOver, first_output, moved, require_finite
from casp.model.modality import visual_tokens

_LOG = logging.getLogger("casp")

MOST_MAP = 1 << 25  # bytes of attention maps, of which eager attention holds several, from which it is not asked for
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""How much of what a block adds may differ between its replay and the model's own forward."""


class _Recorder:
    """Stands in for the blocks' forward: notes the arguments, and what the model does between two blocks.

    Every block but the first is given nothing but what the model itself adds, since the one before it put out `level`
    everywhere: zeros at first; a second pass with other numbers tells whether it does no more than add.
    """

    def __init__(self, depth: int, level: float = 0.0) -> None:
        self.hidden: Tensor | None = None
        self.kwargs: list[dict[str, Any] | None] = [None] * depth
        self.added: dict[int, Tensor] = {}
        self._level = level
        self._last: Tensor | None = None

    def block(self, index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args:
                raise UserError("the model passes positional arguments to its blocks, which CASP cannot replay.")
            if self._last is None:
                self.hidden = hidden_states
                self._last = torch.full_like(hidden_states, self._level).as_subclass(PassedOver)
            elif hidden_states is not self._last:
                self.added[index] = hidden_states - self._level
                self._last = torch.full_like(hidden_states, self._level).as_subclass(PassedOver)
            cache = {"past_key_values": None, "use_cache": False}
            self.kwargs[index] = {key: cache.get(key, value) for key, value in kwargs.items()}
            return self._last

        return forward


@torch.no_grad()
def capture_inputs(
    decoder: Decoder,
    batches: list[dict[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    check: bool = True,
) -> list[BatchInputs]:
    """Run embeddings (and vision tower) over `batches` and record what the blocks would be called with.

    Loads everything outside the blocks, and forgets it again. Hidden states are kept on the CPU in `dtype`. check:
    compare the replay of blocks with the model's own forward on the first batch (`check_replay`). UserError for a model
    whose blocks cannot be run one by one.
    """
    if not decoder.shows_attention:
        _LOG.warning(
            "model type %r computes its attention itself: it cannot be watched, so all tokens count alike where they "
            "should count by the attention they get, and no attention density is measured",
            decoder.config.model_type,
        )
    decoder.load_rest(device, dtype)
    recorded: list[BatchInputs] = []
    only_adds = False  # not told before the first batch with something added: text alone may come before pictures
    try:
        for batch in batches:
            given = on_device(batch, device, dtype)
            recorder = _record(decoder, given, 0.0)
            if recorder.added and not only_adds:
                _check_added(recorder, _record(decoder, given, 1.0))
                only_adds = True
            ids = batch["input_ids"]
            mask = batch.get("attention_mask")
            tokens = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            require_finite(recorder.hidden.cpu(), tokens, f"what comes before the blocks of {decoder.folder}")
            visual = visual_tokens(ids, decoder.config)
            cpu = torch.device("cpu")
            recorded.append(
                BatchInputs(
                    hidden=recorder.hidden.cpu(),
                    kwargs=[moved(kwargs, cpu) for kwargs in recorder.kwargs],
                    tokens=tokens,
                    images=visual["image"],
                    videos=visual["video"],
                    added=moved(recorder.added, cpu),
                    answers=answers_of(batch),
                )
            )
            if check and len(recorded) == 1:
                check_replay(decoder, given, recorded[0], device, dtype)
    finally:
        decoder.unload_rest()
    return recorded


def on_device(batch: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch as the model takes it: floats in `dtype`."""
    return {
        key: value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
        for key, value in batch.items()
    }


def run_outside(decoder: Decoder, given: dict[str, Tensor], block: Callable[[int], Callable[..., Tensor]]) -> None:
    """Run the model on a batch with `block(index)` in the place of each block's forward."""
    for index, module in enumerate(decoder.block_list):
        module.forward = block(index)
    try:
        with told_as(
            f"the model in {decoder.folder} cannot take its calibration batches",
            "its config, processor and weights do not belong together, download it again",
        ):
            decoder.model.base_model(**given, use_cache=False)
    finally:
        for module in decoder.block_list:
            module.__dict__.pop("forward", None)


def _record(decoder: Decoder, given: dict[str, Tensor], level: float) -> _Recorder:
    recorder = _Recorder(len(decoder.blocks), level)
    run_outside(decoder, given, recorder.block)
    for index, kwargs in enumerate(recorder.kwargs):
        if kwargs is None:
            raise UserError(
                f"{decoder.folder}: this calibration data never reaches block {index}, which reads pictures; give data "
                "with a picture in every sample, --dataset demo-images for one."
            )
    return recorder


def _check_added(zeros: _Recorder, ones: _Recorder) -> None:
    for index, added in zeros.added.items():
        if index not in ones.added or not torch.allclose(added, ones.added[index], rtol=1e-2, atol=1e-2):
            raise UserError(
                f"the model changes the hidden states between block {index - 1} and block {index} by more than adding "
                "to them; architectures that do so are not supported."
            )


def _kind(decoder: Decoder, index: int) -> tuple[Any, ...]:
    """What blocks that work alike have in common."""
    types = getattr(decoder.text_config, "layer_types", None) or [None] * len(decoder.blocks)
    modules = tuple((path, type(module).__name__) for path, module in decoder.block(index).named_modules())
    return types[index], modules


def check_replay(
    decoder: Decoder, given: dict[str, Tensor], recorded: BatchInputs, device: torch.device, dtype: torch.dtype
) -> None:
    """UserError unless a block, replayed from what was recorded, does what it does in the model's own forward.

    The first block of every kind is compared, on one batch; the model's own attention is that of transformers. What is
    outside the blocks must be loaded.
    """
    kinds: dict[tuple[Any, ...], int] = {}
    for index in range(len(decoder.blocks)):
        kinds.setdefault(_kind(decoder, index), index)
    for index in kinds.values():
        block = decoder.load_block(index, device, dtype)
        entered, left = _own(decoder, given, index)
        again = first_output(block(entered, **moved(recorded.kwargs[index], device)))
        decoder.unload_block(index)
        tokens = recorded.tokens.to(device)
        change = (left - entered)[tokens].float().norm()
        difference = ((again - left)[tokens].float().norm() / change.clamp_min(1e-12)).item()
        if not difference <= TOLERANCES[dtype]:
            raise UserError(
                f"{decoder.blocks[index]} of model type {decoder.config.model_type!r} does not do the same alone as in "
                f"its model (relative difference {difference:.2g} on the first calibration batch); CASP cannot "
                "compress this architecture faithfully: choose another model."
            )


def _own(decoder: Decoder, given: dict[str, Tensor], index: int) -> tuple[Tensor, Tensor]:
    """What enters and leaves block `index` in the model's own forward, all other blocks passed over."""
    model, block = decoder.model, decoder.block(index)
    seen: list[Tensor] = []

    def at(number: int) -> Callable[..., Any]:
        if number != index:
            return lambda hidden_states, *args, **kwargs: hidden_states.as_subclass(PassedOver)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = type(block).forward(block, hidden_states, *args, **kwargs)
            seen[:] = [hidden_states, first_output(output)]
            return output

        return forward

    if not decoder.shows_attention:
        run_outside(decoder, given, at)
        return seen[0], seen[1]
    batch, tokens = given["input_ids"].shape
    long = 4 * batch * decoder.heads * tokens**2 > MOST_MAP and model._supports_sdpa
    capped = getattr(decoder.text_config, "attn_logit_softcapping", None) is not None
    model.set_attn_implementation("sdpa" if long and not capped else "eager")
    try:
        run_outside(decoder, given, at)
    finally:
        model.set_attn_implementation(NAME)
    return seen[0], seen[1]
