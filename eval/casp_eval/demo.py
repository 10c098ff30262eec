"""A page to try a checkpoint with a picture: `casp demo --model DIR`, then http://127.0.0.1:7860 in a browser.

Served by Python's own http.server to this machine alone. Every question is put anew, without those before it.
"""

import base64
import binascii
import io
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from casp.cli import Parser, add_device_arguments, run_main
from casp.data.chats import Turn
from casp.errors import UserError
from casp.model.checkpoint import size
from casp.numbers import whole
from casp.reading.documents import parse_json
from casp.reading.pictures import read_picture
from casp_eval.loading import Checkpoint, open_checkpoint
from casp_eval.options import MOST_CHARACTERS, MOST_NEW_TOKENS, add_model_argument

PAGE = Path(__file__).with_name("page.html")
MOST_BYTES = 64 << 20  # of a request: a picture in base64
LOCAL = ("127.0.0.1", "localhost")


def picture_of(url: str) -> Image.Image:
    """The picture in a `data:` URL, decoded; UserError for anything else."""
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise UserError("the picture is no image file; choose a PNG, JPEG or WebP file.")
    try:
        return read_picture(io.BytesIO(base64.b64decode(data, validate=True)), "the picture")
    except binascii.Error as error:
        raise UserError("the picture did not arrive whole; choose it again.") from error


class Answers:
    """One checkpoint that answers one question at a time."""

    def __init__(self, checkpoint: Checkpoint, name: str, max_new_tokens: int) -> None:
        self.checkpoint, self.name, self.max_new_tokens = checkpoint, name, max_new_tokens
        self.lock = threading.Lock()

    def about(self) -> dict[str, Any]:
        """What the page says of the model."""
        stored = size(self.checkpoint.folder)
        says = f"{stored.bytes / 1e6:.1f} MB of linears, {stored.bpw:.2f} bits a weight"
        return {"model": self.name, "says": says, "pictures": self.checkpoint.is_multimodal}

    def ask(self, asked: Any) -> dict[str, Any]:
        """The answer to {"question": text, "picture": a data: URL or None}; UserError for anything else."""
        question = asked.get("question") if isinstance(asked, dict) else None
        if not isinstance(question, str) or not question.strip():
            raise UserError("there is no question; write one.")
        if len(question) > MOST_CHARACTERS:
            raise UserError(f"the question is longer than {MOST_CHARACTERS} characters; ask a shorter one.")
        picture = picture_of(str(asked["picture"])) if asked.get("picture") else None
        if picture is not None and not self.checkpoint.is_multimodal:
            raise UserError(f"{self.name} takes no pictures; ask without one.")
        checkpoint = self.checkpoint
        with self.lock:
            began = time.perf_counter()
            prompt, _ = checkpoint.prompt([Turn("user", (question,) if picture is None else (picture, question))])
            inputs = checkpoint.encode([prompt], None if picture is None else [[picture]], "left")
            length = inputs["input_ids"].shape[1]
            made = checkpoint.generate(inputs, max_new_tokens=self.max_new_tokens)[0, length:]
            answer = checkpoint.tokenizer.decode(made, skip_special_tokens=True).strip()
        return {"answer": answer, "tokens": len(made), "seconds": time.perf_counter() - began}


def server(answers: Answers, port: int) -> ThreadingHTTPServer:
    """The server of the page on this machine's loopback; port 0 takes one that is free."""

    class Handler(BaseHTTPRequestHandler):
        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _json(self, status: int, content: dict[str, Any]) -> None:
            self._send(status, "application/json", json.dumps(content).encode())

        def _is_local(self) -> bool:
            # A page of another site that is open in the same browser shall not ask here.
            origin = self.headers.get("Origin")
            try:
                return origin is None or urlsplit(origin).hostname in LOCAL
            except ValueError:
                return False

        def do_GET(self) -> None:
            if self.path == "/":
                self._send(200, "text/html; charset=utf-8", PAGE.read_bytes())
            elif self.path == "/about":
                self._json(200, answers.about())
            else:
                self._json(404, {"error": "there is no such page."})

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if self.path != "/ask" or not self._is_local():
                return self._json(404, {"error": "there is no such page."})
            if not re.fullmatch("[0-9]{1,12}", length) or int(length) > MOST_BYTES:
                return self._json(413, {"error": "the picture is too large; scale it down."})
            try:
                sent = self.rfile.read(int(length))
                self._json(200, answers.ask(parse_json(sent, "the request", "load the page again", object)))
            except UserError as error:
                self._json(400, {"error": str(error)})

        def log_message(self, *words: Any) -> None:
            """Nothing: what is asked is nobody else's business."""

    return ThreadingHTTPServer((LOCAL[0], port), Handler)


def main(arguments: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    parser = Parser(prog="demo.sh", description="A page in the browser to try a checkpoint, with a picture or without.")
    add_model_argument(parser)
    parser.add_argument(
        "--port", type=whole(0, 65535), default=7860, help="of 127.0.0.1, 0: any (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1, MOST_NEW_TOKENS),
        default=128,
        help="longest answer, in tokens (default: %(default)s)",
    )
    add_device_arguments(parser)
    options = parser.parse_args(arguments)
    checkpoint = open_checkpoint(options.model, options.device, options.dtype)
    try:
        page = server(Answers(checkpoint, options.model, options.max_new_tokens), options.port)
    except OSError as error:
        raise UserError(f"port {options.port} cannot be had ({error.strerror}); choose another --port.") from error
    print(f"{options.model} answers at http://{LOCAL[0]}:{page.server_port} (Ctrl-C ends it)", flush=True)
    with page:
        page.serve_forever()


if __name__ == "__main__":
    run_main(main)
