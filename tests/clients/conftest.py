"""Compressed tiny models, and Python environments that differ in what is installed."""

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CALIBRATION = ("--samples", "4", "--sequence-length", "64")


@pytest.fixture(scope="session")
def gptq(tiny_llama: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` by GPTQ at 4 bits."""
    from casp_gptq.__main__ import main

    folder = tmp_path_factory.mktemp("clients") / "gptq"
    flags = ["--bits", "4", "--group-size", "32", "--dataset", str(texts), *CALIBRATION, "--output", str(folder)]
    main(["--model", str(tiny_llama), *flags])
    return folder


@pytest.fixture(scope="session")
def gptq_low_rank(low_rank: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`low_rank` by GPTQ: low-rank layers whose factors are packed."""
    from casp_gptq.__main__ import main

    folder = tmp_path_factory.mktemp("clients") / "gptq-low-rank"
    flags = ["--bits", "4", "--group-size", "32", "--dataset", str(texts), *CALIBRATION, "--output", str(folder)]
    main(["--model", str(low_rank), *flags])
    return folder


@pytest.fixture(scope="session", params=["installed", pytest.param("oldest", marks=pytest.mark.slow)])
def without_casp(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has all packages of this one, but not CASP; once with the oldest transformers that we support."""
    oldest = request.param == "oldest"
    folder = tmp_path_factory.mktemp("stock")
    venv.create(folder, with_pip=oldest)
    (site,) = folder.glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(here) + "\n")  # whose own .pth files are not read
    python = str(folder / "bin" / "python")
    found = subprocess.run([python, "-c", "import casp"], capture_output=True, cwd=folder)
    if found.returncode == 0:
        pytest.skip("CASP is installed as a copy, which every environment with these packages has")
    if oldest:
        version = re.search(r"^transformers>=(.+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
        wanted = f"transformers=={version}.*"
        done = subprocess.run([python, "-m", "pip", "install", "-q", wanted], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip has no {wanted} to install: {done.stderr.strip().splitlines()[-1]}")
        code = "import transformers; print(transformers.__version__)"
        told = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=folder, check=True).stdout
        assert told.startswith(f"{version}.")
    return python


@pytest.fixture(scope="session")
def told() -> Callable[..., dict]:
    """Runs Python code in a process of its own and returns what it prints last, a JSON object."""

    def run(code: str, *arguments: object, python: str = sys.executable, **variables: str) -> dict:
        done = subprocess.run(
            [python, "-c", code, *map(str, arguments)],
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | variables,
            cwd="/",
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
