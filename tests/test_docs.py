"""Examples in the documentation run as they stand there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_python(tiny_llama: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """docs/python.md, on a smaller model."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)[1]
    for written, here in (("demo-llama", tiny_llama), ("demo-text", texts)):
        assert f'"{written}"' in code
        code = code.replace(f'"{written}"', repr(str(here)))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "docs/python.md", "exec"), names)
    assert names["checkpoint"] == Path("demo-llama-small")
    assert (names["checkpoint"] / "config.json").is_file()
    out = capsys.readouterr().out
    assert "gptq-plan: 3 of 3 blocks" in out
