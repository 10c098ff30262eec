"""The page to try a model: over real HTTP, and once in a real browser (slow)."""

import base64
import http.client
import io
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from casp_eval.demo import Answers, server
from casp_eval.loading import open_checkpoint
from PIL import Image

from casp.data.chats import Turn

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


def picture(side: int = 32) -> str:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def page(tiny_llava: Path) -> Iterator[Any]:
    answers = Answers(open_checkpoint(str(tiny_llava), "cpu", "float32"), "tiny", max_new_tokens=4)
    with server(answers, 0) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield serving
        serving.shutdown()


def request(page: Any, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=300)
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, raw, headers)
    reply = connection.getresponse()
    content = reply.read()
    is_json = reply.getheader("Content-Type") == "application/json"
    return reply.status, json.loads(content) if is_json else content.decode()


def test_a_question_about_a_picture(page: Any, tiny_llava: Path):
    status, reply = request(page, "/ask", {"question": "what?", "picture": picture()})
    assert status == 200
    checkpoint = open_checkpoint(str(tiny_llava), "cpu", "float32")
    image = Image.new("RGB", (32, 32), "red")
    prompt, _ = checkpoint.prompt([Turn("user", (image, "what?"))])
    inputs = checkpoint.encode([prompt], [[image]], "left")
    made = checkpoint.model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert reply["answer"] == checkpoint.tokenizer.decode(made, skip_special_tokens=True).strip()
    assert reply["tokens"] == len(made)
    assert request(page, "/ask", {"question": "what?"})[0] == 200  # and without one


def test_the_page_says_what_it_shows(page: Any):
    status, about = request(page, "/about")
    assert (status, about["model"], about["pictures"]) == (200, "tiny", True)
    assert "bits a weight" in about["says"]
    assert request(page, "/")[1].startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"question": " "}, "no question"),
        ([], "no question"),
        (b"{", "Expecting"),
        ({"question": "a", "picture": "file:///etc/passwd"}, "no image file"),
        ({"question": "a", "picture": "data:image/png;base64,AAAA"}, "does not open"),
        ({"question": "a", "picture": "data:image/png;base64,A"}, "did not arrive whole"),
        ({"question": "a " * 20_000}, "longer than"),
        (b"[" + b"[]," * 6_000_000 + b"[]]", "more than"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"question": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_what_cannot_be_asked(page: Any, body: Any, named: str):
    status, reply = request(page, "/ask", body)
    assert status == 400
    assert named in reply["error"]


def test_pages_of_others_cannot_ask(page: Any):
    asked = {"question": "a"}
    assert request(page, "/ask", asked, Origin="http://example.org")[0] == 404
    assert request(page, "/ask", asked, Origin=f"http://127.0.0.1:{page.server_port}")[0] == 200
    assert request(page, "/ask", b"", **{"Content-Length": str(1 << 40)})[0] == 413
    assert request(page, "/ask", b"", **{"Content-Length": "9" * 5000})[0] == 413
    assert request(page, "/ask", b"", **{"Content-Length": "\xb2"})[0] == 413
    assert request(page, "/ask", asked, Origin="http://[")[0] == 404
    assert request(page, "/../secret")[0] == 404


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a headless Chromium")
def test_in_a_browser(page: Any, tmp_path: Path):
    """Somebody chooses a picture, asks, and reads the answer of the server."""
    playwright = pytest.importorskip("playwright.sync_api")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        view = browser.new_page()
        view.goto(f"http://127.0.0.1:{page.server_port}/")
        playwright.expect(view.locator("#about")).to_contain_text("bits a weight", timeout=60_000)
        view.set_input_files("#picture", str(tmp_path / "red.png"))
        view.fill("#question", "what?")
        view.click("button")
        playwright.expect(view.locator("#speed")).to_contain_text("tokens in", timeout=60_000)
        answer, shown = view.inner_text("#answer"), view.locator("#shown").bounding_box()
        browser.close()
    assert answer.strip() == request(page, "/ask", {"question": "what?", "picture": picture()})[1]["answer"]
    assert shown["width"] > 0
