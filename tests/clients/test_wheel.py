"""The wheel: what is in it, and (slow) that it works installed, from any folder."""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = shutil.ignore_patterns(".venv", ".git", "runs", "build", "*.egg-info", "__pycache__", ".cache", ".*_cache")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `pip wheel .` builds it, by the hooks that pip calls, from a copy of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    code = (
        "import sys; sys.path.insert(0, 'entry'); import build_backend; print(build_backend.build_wheel(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=folder / "source", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def test_what_is_in_it(wheel: Path):
    with zipfile.ZipFile(wheel) as opened:
        assert opened.testzip() is None
        names = set(opened.namelist())
        (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
        lines = [line.rsplit(",", 2) for line in opened.read(record).decode().splitlines()]
        assert {name.strip('"') for name, _, _ in lines} == names
        for name, digest, length in lines:
            if digest:
                content = opened.read(name.strip('"'))
                expected = urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                assert (digest, length) == (f"sha256={expected}", str(len(content)))
    assert "casp.pth" in names
    assert "casp_eval/page.html" in names
    assets = ROOT / "assets"
    for part in ("demo-llava", "demo-video", "text", "tiles"):
        for file in (assets / part).iterdir():
            assert f"casp_assets/{part}/{file.name}" in names
    packages = {path.parent.name for path in ROOT.glob("*/casp_*/__init__.py")} | {"casp", "casp_assets"}
    assert {name.partition("/")[0] for name in names if name.endswith("/__init__.py")} >= packages
    for module in (ROOT / "casp").rglob("*.py"):
        assert str(module.relative_to(ROOT)) in names


@pytest.mark.slow
def test_quickstart_from_an_empty_folder(wheel: Path, tiny_llava: Path, tmp_path: Path):
    """Installed as a copy beside the other packages of this environment, CASP does what quickstart.sh does.

    Stages and the report are run on the built-in model; the two whole jobs, whose time is planning and the search of
    the trellis, on a tiny one.
    """
    environment, place = tmp_path / "environment", tmp_path / "empty"
    venv.create(environment, with_pip=True)
    (site,) = environment.glob("lib/python*/site-packages")
    python = str(environment / "bin/python")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "zz_others.pth").write_text("\n".join(others) + "\n")
    place.mkdir()

    def run(*words: object) -> str:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("CASP_")}
        variables |= {"HF_HUB_OFFLINE": "1", "CASP_CACHE": os.environ.get("CASP_CACHE", str(tmp_path / "cache"))}
        done = subprocess.run(list(map(str, words)), cwd=place, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    origin = run(python, "-c", "import casp, casp_assets; print(casp.__file__, casp_assets.__file__)")
    assert all(path.startswith(str(site)) for path in origin.split())
    casp, data = environment / "bin/casp", ("--samples", 4, "--dataset", "demo-images")
    assert "compress" in run(casp, "--help")
    run(casp, "svd", "--model", "demo-llava", *data, "--output", "svd")
    run(casp, "quantize", "--backend", "gptq", "--model", "svd", "--bits", 3, *data, "--output", "gptq")
    job = ("--model", tiny_llava, *data, "--backend", "quip-sharp", "--bits", 4, "--moments", "moments")
    job += ("--costs", "costs")
    run(casp, "compress", *job, "--allocation", "uniform", "--output", "uniform")
    run(casp, "compress", *job, "--output", "planned")
    assert (place / "planned/casp_recipe.json").is_file()
    sizes = ("--windows", 1, "--questions", 2, "--max-new-tokens", 4)
    run(casp, "compare", "svd", "3-bit=gptq", *sizes, "--output", "report", "--update-cards")
    assert (place / "report/report.md").is_file()
    code = "import sys; from transformers import AutoModelForImageTextToText as Auto\n"
    code += "for name in ('gptq', 'uniform', 'planned'): Auto.from_pretrained(name)\n"
    code += "print('casp' in sys.modules)"
    assert run(python, "-c", code).split()[-1] == "True"
