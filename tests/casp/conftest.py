"""Fixtures of the core's tests."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

TOY = Path(__file__).with_name("toy_package.py")
sys.path.insert(0, str(TOY.parent))  # for what the tests of data share


@pytest.fixture(scope="package")
def toy_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site folder with the toy third-party backend, on sys.path for these tests."""
    spec = importlib.util.spec_from_file_location("toy_package", TOY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = module.install(tmp_path_factory.mktemp("site"))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of 4000 characters (= tokens of the tiny models) in which every place reads differently."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number:04d}\n" for number in range(800)))
    return path


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    """Ten rows of image, question and answer; answers of different lengths; a blank line at the end."""
    rows = []
    for number in range(10):
        Image.new("RGB", (30 + number, 40), (25 * number, 90, 200)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": f"what is {number}?", "answer": "x" * (1 + 3 * number)})
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path
