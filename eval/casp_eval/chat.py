"""Ask a checkpoint in the shell: `python -m casp_eval.chat --model DIR --image FILE` or `--video FILE`.

Reads questions from standard input, one a line, until it ends; answers go to standard output as they are
written. Every question is put anew, without those before it: the models made here answer one question about
one image or video.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import TextStreamer

from casp.cli import Parser, add_device_arguments, add_frames_argument, model_folder, run_main
from casp.data.chats import Turn, Video
from casp.errors import UserError
from casp.numbers import whole
from casp.reading.config import open_config
from casp.reading.pictures import Image, open_picture
from casp.reading.video import open_frames
from casp_eval.loading import Checkpoint, open_checkpoint, require_images
from casp_eval.options import MOST_CHARACTERS, MOST_NEW_TOKENS, add_model_argument


class _Timer(TextStreamer):
    """A TextStreamer that notes when each token came, and leaves out the blank that many answers begin with."""

    def __init__(self, tokenizer: object) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self.begun = False

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # the first is the prompt
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        super().on_finalized_text(text, stream_end)


def reply(checkpoint: Checkpoint, question: str, shown: Image.Image | Video | None, max_new_tokens: int) -> float:
    """Print the answer to stdout as it is written; returns tokens per second after the first token.

    The first token's time is that of reading the question; NaN when there is no second one.
    """
    turn = Turn("user", (question,) if shown is None else (shown, question))
    prompt, _ = checkpoint.prompt([turn])
    inputs = checkpoint.encode(
        [prompt], [turn.pictures()] if turn.pictures() else None, "left", [turn.videos()] if turn.videos() else None
    )
    timer = _Timer(checkpoint.tokenizer)
    checkpoint.generate(inputs, max_new_tokens=max_new_tokens, streamer=timer)
    tokens = len(timer.times) - 2
    return tokens / (timer.times[-1] - timer.times[1]) if tokens > 0 else float("nan")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        prog="chat.sh",
        description="Ask a checkpoint, about an image, a video or neither. Questions are read one a line.",
    )
    add_model_argument(parser)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--image", help="the picture to ask about (multimodal models)")
    shown.add_argument("--video", type=Path, help="the video to ask about, a file or a folder of frames")
    add_frames_argument(parser)
    parser.add_argument("--question", help="ask this and end (default: read questions from standard input)")
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1, MOST_NEW_TOKENS),
        default=128,
        help="longest answer, in tokens (default: %(default)s)",
    )
    add_device_arguments(parser)
    options = parser.parse_args(arguments)
    shown: Image.Image | Video | None = None
    if options.image is not None:
        shown = open_picture(options.image)
    elif options.video is not None:
        shown = Video(open_frames(options.video, options.frames, "--video"))
    folder = model_folder(options.model)
    if shown is not None:
        require_images(folder, open_config(folder))
    checkpoint = open_checkpoint(options.model, options.device, options.dtype)
    if options.question is not None:
        asked = iter([options.question])
    else:
        asked = _lines()
    for question in asked:
        if len(question) > MOST_CHARACTERS:
            raise UserError(f"a question is longer than {MOST_CHARACTERS} characters; ask a shorter one.")
        speed = reply(checkpoint, question, shown, options.max_new_tokens)
        if speed == speed:
            print(f"{speed:.1f} tokens/s", file=sys.stderr)


def _lines():
    """Questions from standard input; a prompt is shown only to somebody who types."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline(MOST_CHARACTERS + 2)
        except UnicodeDecodeError as error:
            raise UserError(
                "what standard input holds is no text in UTF-8; give questions as text, one a line."
            ) from error
        if not line:
            return
        if line.strip():
            yield line.strip()


if __name__ == "__main__":
    run_main(main)
