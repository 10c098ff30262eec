"""`transformers serve` with a compressed model, asked by HTTP (slow: needs its extra "serving")."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers.utils.import_utils import is_serve_available

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason='needs pip install "transformers[serving]"'),
]

SERVE = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"


@contextmanager
def serving(folder: Path) -> Iterator[Callable[[Any], str]]:
    """While open, asks the served model: content of one turn -> its answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", SERVE, "serve", str(folder), "--device", "cpu", "--host", "127.0.0.1"]
    process = subprocess.Popen([*command, "--port", str(port)], env=os.environ | {"HF_HUB_OFFLINE": "1"})

    def ask(content: Any) -> str:
        wanted = {"model": str(folder), "messages": [{"role": "user", "content": content}], "max_tokens": 6}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(wanted).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request, timeout=300))["choices"][0]["message"]["content"]

    try:
        for _ in range(300):
            assert process.poll() is None
            try:
                urllib.request.urlopen(f"{address}/health", timeout=10).close()
                break
            except urllib.error.URLError:
                time.sleep(1)
        yield ask
    finally:
        process.terminate()
        process.wait()


def test_text(gptq: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with serving(gptq) as ask:
        answer = ask("hello")
    tokenizer = AutoTokenizer.from_pretrained(gptq)
    turn = [{"role": "user", "content": "hello"}]
    inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = AutoModelForCausalLM.from_pretrained(gptq).generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == expected


def test_a_picture(tiny_llava: Path, texts: Path, tmp_path: Path):
    from casp_gptq.__main__ import main

    flags = ["--bits", "4", "--group-size", "32", "--dataset", str(texts), "--samples", "4", "--sequence-length", "64"]
    main(["--model", str(tiny_llava), *flags, "--output", str(tmp_path / "made")])
    answers = []
    with serving(tmp_path / "made") as ask:
        for colour in ("black", "white"):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), colour).save(file, "png")
            url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            answers.append(ask([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]))
    assert all(answers)
