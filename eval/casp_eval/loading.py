"""Open a checkpoint for evaluation: model, tokenizer and, for a multimodal model, its processor."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessorList,
)
from transformers.utils import logging

import casp  # noqa: F401  (registers the quantization method "casp" with transformers)
from casp.cli import compute_named, model_folder
from casp.data.chats import Turn, messages
from casp.errors import UserError, in_brief, told_as
from casp.model.decoder import check_weights
from casp.model.modality import is_multimodal
from casp.model.shards import read_entries
from casp.reading.config import open_config, quantization_of
from casp.reading.pretrained import check_ids, open_processor, open_tokenizer, require_video

Messages = list[dict[str, Any]]


@dataclass
class Checkpoint:
    """A model ready to be evaluated. `chat` is the processor of a multimodal model, else the tokenizer."""

    folder: Path
    config: Any
    model: nn.Module
    tokenizer: Any
    processor: Any | None
    device: torch.device

    @property
    def chat(self) -> Any:
        return self.processor if self.processor is not None else self.tokenizer

    @property
    def is_multimodal(self) -> bool:
        return self.processor is not None

    def prompt(self, asked: Sequence[Turn], answer: str | None = None) -> tuple[str, str]:
        """The model's own chat template filled in: (text up to the answer, the answer as the template spells it).

        asked: all turns before the answer. The second part is empty without an answer. Templates put a space, a
        newline or nothing before the answer, so it is cut out of the rendered conversation rather than appended to
        the prompt.
        """
        template = getattr(self.chat, "chat_template", None)
        if not template:
            raise UserError(
                f"{self.folder} has no chat template, so questions cannot be put to it: add a chat_template.jinja "
                "to the folder, or evaluate its text perplexity alone"
            )
        turns = messages(asked, strings=not self.is_multimodal)
        with told_as(f"the chat template of {self.folder} cannot be filled in", "copy the original model's there"):
            before = self.chat.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            if answer is None:
                return before, ""
            reply = messages([Turn("assistant", (answer,))], strings=not self.is_multimodal)
            whole = self.chat.apply_chat_template([*turns, *reply], tokenize=False)
        end = whole.rfind(answer) + len(answer)
        if whole.startswith(before) and end > len(before):
            return before, whole[len(before) : end]
        # Some templates render a past answer unlike the one being written (without its reasoning block, say).
        return before, answer

    def running(self) -> AbstractContextManager[None]:
        """Around what runs the model: what its config, weights and processor make impossible is a UserError."""
        remedy = "its config, processor and weights do not belong together, make or download it again"
        return told_as(f"{self.folder} cannot be run", remedy)

    @torch.inference_mode()
    def generate(self, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
        """Token ids, (rows, tokens), of `inputs` (of `encode`, padded left) with what the model writes after each row.

        settings: of transformers' `generate`. UserError where a logit is NaN or infinite: the most likely token would
        be token 0, often a special one, and the answer would be empty as if the model had nothing to say.
        """
        with self.running():
            return self.model.generate(**inputs, logits_processor=LogitsProcessorList([self._finite]), **settings)

    def generated(self, inputs: dict[str, Tensor], **settings: Any) -> list[str]:
        """What the model writes after each row of `inputs`, see `generate`, as text without special tokens."""
        output = self.generate(inputs, **settings)
        return self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _finite(self, _: Tensor, scores: Tensor) -> Tensor:
        """A logits processor that changes nothing; tokens that others rule out are at minus infinity."""
        if (scores.isnan() | scores.isposinf()).any():
            raise UserError(f"{self.folder} gives NaN or infinity as logits: try --dtype float32 or make it again")
        return scores

    def encode(
        self,
        texts: list[str],
        images: list[list[Any]] | None,
        padding_side: str,
        videos: list[list[Any]] | None = None,
    ) -> dict[str, Tensor]:
        """Model inputs for rendered prompts, padded to the longest, on the model's device and dtype.

        images, videos: the PIL images and the opened videos of each text, or None; of a video all frames are seen.
        padding_side: "left" to generate, "right" to score.
        """
        bos = self.tokenizer.bos_token
        options: dict[str, Any] = {
            "return_tensors": "pt",
            "padding": True,
            "padding_side": padding_side,
            # A template that writes the first token itself must not get a second one.
            "add_special_tokens": not (bos and texts[0].startswith(bos)),
        }
        if videos is not None:
            require_video(self.processor, self.folder, "a question")
        with told_as(f"the processor of {self.folder} cannot take a question", "copy the original model's files there"):
            if images is not None or videos is not None:
                given = {} if images is None else {"images": images}
                if videos is not None:
                    given["videos"] = [[video.array() for video in of_text] for of_text in videos]
                    options["videos_kwargs"] = {"do_sample_frames": False}
                batch = self.processor(text=texts, **given, **options)
            else:
                batch = self.tokenizer(texts, **options)
        check_ids(batch["input_ids"], self.config, self.folder)
        return {
            name: value.to(self.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }


def require_images(folder: Path, config: Any) -> None:
    """UserError for a model that takes no images; told from the configuration, before weights are read."""
    if not is_multimodal(config):
        raise UserError(
            f"{folder} is a text-only model ({config.model_type}) and takes no images: leave the images out, or give "
            "a multimodal model"
        )


def open_checkpoint(model: str, device: str, dtype: str) -> Checkpoint:
    """Load a folder, hub id or built-in name for evaluation.

    device, dtype: as on the command line ("auto": the GPU when there is one; float32 on a CPU, where bfloat16
    products are several times slower, else the checkpoint's own).
    """
    folder = model_folder(model)
    config = open_config(folder)
    compute = compute_named(device, dtype).of(config.dtype or torch.float32)
    _check_stored(folder, config)
    multimodal = is_multimodal(config)
    processor = open_processor(folder) if multimodal else None
    tokenizer = processor.tokenizer if multimodal else open_tokenizer(folder)
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    remedy = "make or download it again"
    # Safetensors alone: the other format is a pickle, which runs what it holds.
    options = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    try:
        with _quiet_transformers():
            loaded, info = auto.from_pretrained(folder, dtype=compute.dtype, output_loading_info=True, **options)
    except ImportError as error:
        method = quantization_of(config).get("quant_method", config.model_type)
        raise UserError(
            f"{folder} needs a package that is not installed to be read ({method}: {in_brief(error)}): install it"
        ) from error
    except UserError:
        raise
    except Exception as error:  # safetensors and strict configs have exceptions of their own
        raise UserError(f"{folder} cannot be loaded ({in_brief(error)}): {remedy}") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise UserError(
            f"{folder} lacks {len(names)} tensors (first: {names[0]}), which would be evaluated as random numbers: "
            f"{remedy}"
        )
    for name, tensor in loaded.state_dict().items():
        if tensor.is_floating_point() and tensor.itemsize > 1 and not torch.isfinite(tensor).all():
            raise UserError(f"{name} in {folder} holds NaN or infinity: {remedy}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out wherever it stands
    loaded = loaded.to(compute.device).eval()
    loaded.generation_config = _greedy(loaded.generation_config, tokenizer)
    return Checkpoint(folder, config, loaded, tokenizer, processor, compute.device)


def _check_stored(folder: Path, config: Any) -> None:
    """UserError where the stored weights are not what the config describes, before any of them is read."""
    if quantization_of(config).get("quant_method", "casp") == "casp":
        check_weights(folder)
    else:
        read_entries(folder)


def _greedy(own: GenerationConfig, tokenizer: Any) -> GenerationConfig:
    """Plain greedy decoding: of the model's own settings keep the special tokens, not its sampling or penalties."""
    eos = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    for token in (own.bos_token_id, *(eos if isinstance(eos, list) else [eos])):
        if token is not None and not (type(token) is int and 0 <= token < 1 << 31):
            raise UserError(
                f"generation_config.json names {str(token)[:40]!r} as a token; copy the original model's file there"
            )
    return GenerationConfig(
        do_sample=False, bos_token_id=own.bos_token_id, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress and loading report off the terminal; what matters in them is told as an error."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
