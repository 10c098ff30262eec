"""Compressed tiny models, and Python environments that differ in what is installed."""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def without_casp(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has all packages of this one, but not CASP."""
    folder = tmp_path_factory.mktemp("stock")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(here) + "\n")  # whose own .pth files are not read
    python = str(folder / "bin" / "python")
    found = subprocess.run([python, "-c", "import casp"], capture_output=True, cwd=folder)
    if found.returncode == 0:
        pytest.skip("CASP is installed as a copy, which every environment with these packages has")
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
