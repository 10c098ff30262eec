"""Tokenizers and processors of a model folder, opened without running code that the folder brings."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer

from casp.errors import UserError, in_brief, told_as
from casp.reading.config import check_folder
from casp.reading.documents import read_json
from casp.reading.files import is_there

PLAIN_PROMPTS = {
    # "image tokens, question, newline, answer": https://huggingface.co/docs/transformers/model_doc/paligemma
    "PaliGemmaProcessor": "{% for message in messages %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] == 'user' %}{{ '\n' }}{% endif %}{% endfor %}",
}
"""Processors of families that have no chat template -> their documented prompt, written as one."""


def _open(kind: type, what: str, folder: Path) -> Any:
    check_folder(folder)
    for name in ("tokenizer.json", "vocab.json"):
        if is_there(folder / name):
            read_json(folder / name, f"the {what}'s file")
    try:
        with told_as(f"cannot load the {what} of {folder}", "copy the original model's files there"):
            return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except UserError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        raise UserError(
            f"the {what} of {folder} needs a package that is not installed ({in_brief(error.__cause__)}): run "
            "`bash setup.sh`, or pip install -r requirements.txt"
        ) from error


def _check_length(tokenizer: Any, folder: Path) -> None:
    if type(getattr(tokenizer, "model_max_length", 0)) not in (int, float):
        raise UserError(f"tokenizer_config.json in {folder} gives no number as model_max_length; correct it.")


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of the model in `folder`."""
    tokenizer = _open(AutoTokenizer, "tokenizer", Path(folder))
    _check_length(tokenizer, folder)
    return tokenizer


def open_processor(folder: Path) -> Any:
    """The processor of the multimodal model in `folder`, with its tokenizer and image processor."""
    processor = _open(AutoProcessor, "processor", Path(folder))
    for part in ("tokenizer", "image_processor"):
        if not hasattr(processor, part):
            raise UserError(
                f"{folder} has no {part.replace('_', ' ')}: copy the original model's processor files there"
            )
    _check_length(processor.tokenizer, folder)
    if not getattr(processor, "chat_template", None):
        processor.chat_template = PLAIN_PROMPTS.get(type(processor).__name__)
    return processor


def require_video(processor: Any, folder: Path, source: str) -> None:
    """UserError where the processor of the model in `folder` has no way to read the video of `source`.

    Such a processor leaves a video out without a word, and what is asked about it would be asked about nothing.
    """
    if getattr(processor, "video_processor", None) is None:
        raise UserError(f"the model in {folder} reads no videos, and {source} has one: use a video model or pictures")


def check_ids(ids: Tensor, config: Any, folder: Path) -> None:
    """UserError where a tokenizer made token ids (any shape) that the model has no embedding for."""
    rows = config.get_text_config().vocab_size
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise UserError(
            f"the tokenizer of {folder} makes token {int(ids.max())}, the model has {rows}: copy the original model's "
            "tokenizer files there"
        )
