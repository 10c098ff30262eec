"""setup.sh, in a copy of the repository's lists with a Python that only writes down what it is asked to do."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: Stands in for python3: `-c` asks the real one, `-m venv DIR` makes DIR/bin/python, `-m pip` is written down
#: and fails where its arguments end in $REFUSE.
FAKE = """#!/bin/bash
case "$1 $2" in
    "-c "*) exec {python} "$@" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") shift 2; echo "$*" >>{log}; [[ -z "$REFUSE" || "$*" != *"$REFUSE" ]] ;;
esac
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The files that setup.sh reads, in a folder of their own whose name has a blank."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for path in [ROOT / "setup.sh", ROOT / "pyproject.toml", *ROOT.glob("requirements*.txt")]:
        shutil.copy(path, folder)
    (folder / "entry").mkdir()
    for path in (ROOT / "entry").glob("*.py"):
        shutil.copy(path, folder / "entry")
    left_out = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "quip-sharp/quiptools", folder / "quip-sharp/quiptools", ignore=left_out)
    return folder


@pytest.fixture
def setup(repository: Path, tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess, list[str]]]:
    """Runs setup.sh from another folder; returns how it ended and the pip commands it ran."""
    tools, log = tmp_path / "tools", tmp_path / "log"
    tools.mkdir()
    fake = tools / "python3"
    fake.write_text(FAKE.format(python=sys.executable, log=log))
    fake.chmod(0o755)
    shutil.copy("/bin/true", tools / "c++")

    def run(*arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        log.write_text("")
        inherited = {name: value for name, value in os.environ.items() if name != "CASP_VENV"}
        environment = inherited | {"PATH": f"{tools}:{os.environ['PATH']}"} | variables
        command = ["bash", str(repository / "setup.sh"), *arguments]
        done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
        return done, log.read_text().splitlines()

    return run


def test_a_second_call_does_nothing(setup, repository: Path):
    first, installed = setup("dev")
    assert first.returncode == 0, first.stderr
    assert (repository / ".venv/bin/python").exists()
    said = first.stdout.splitlines()
    assert len(said) == 7
    assert all(line.startswith("setup: ") for line in said)
    assert len(installed) == 6
    assert any("-e" in command and "--no-deps" in command for command in installed)
    assert any("requirements-demo.txt" in command and "--no-deps" in command for command in installed)
    assert any(command.endswith("requirements.txt") and "--no-deps" not in command for command in installed)
    begin = time.monotonic()
    second, installed = setup("dev")
    assert (second.returncode, second.stdout, installed) == (0, "", [])
    assert time.monotonic() - begin < 5  # under a second on a quiet machine


def test_the_test_tools_come_on_demand(setup):
    _, installed = setup()
    assert not any("requirements-dev.txt" in command for command in installed)
    _, installed = setup("dev")
    assert len(installed) == 1
    assert installed[0].endswith("requirements-dev.txt")


def test_a_changed_list_is_installed_again_and_nothing_else(setup, repository: Path):
    setup("dev")
    with (repository / "requirements.txt").open("a") as file:
        file.write("einops\n")
    done, installed = setup("dev")
    assert len(done.stdout.splitlines()) == len(installed) == 1
    assert installed[0].endswith("requirements.txt")


def test_a_failed_step_is_repeated(setup):
    done, installed = setup(REFUSE="requirements-demo.txt")
    assert done.returncode != 0
    assert installed[-1].endswith("requirements-demo.txt")
    done, installed = setup()
    assert done.returncode == 0
    assert installed[0].endswith("requirements-demo.txt")
    assert len(installed) == 3


def test_kernels_are_built_again_when_their_source_changes(setup, repository: Path):
    setup()
    with (repository / "quip-sharp/quiptools/csrc/cpu_ops.cpp").open("a") as file:
        file.write("// changed\n")
    done, installed = setup("dev")
    assert done.returncode == 0
    assert [command.rpartition("/")[2] for command in installed] == ["quiptools", "requirements-dev.txt"]


def test_kernels_that_do_not_build_stop_only_developers(setup):
    done, installed = setup(REFUSE="quip-sharp/quiptools")
    assert done.returncode == 0
    assert "setup: the kernels could not be built" in done.stderr
    done, again = setup("dev", REFUSE="quip-sharp/quiptools")
    assert done.returncode != 0
    assert again == installed[-1:]


def test_no_compiler_is_no_error(setup):
    done, installed = setup(CXX="no-such-compiler")
    assert done.returncode == 0
    assert "setup: no C++ compiler (no-such-compiler)" in done.stdout
    assert not any("quiptools" in command for command in installed)


def test_another_folder(setup, repository: Path, tmp_path: Path):
    done, _ = setup(CASP_VENV=str(tmp_path / "elsewhere"))
    assert done.returncode == 0
    assert (tmp_path / "elsewhere/bin/python").exists()
    assert not (repository / ".venv").exists()


def test_an_environment_without_python_is_made_anew(setup, repository: Path):
    setup()
    (repository / ".venv/bin/python").unlink()
    done, installed = setup()
    assert done.returncode == 0
    assert len(installed) == 5


def test_an_old_python_is_refused(repository: Path, tmp_path: Path):
    tools = tmp_path / "old"
    tools.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14", "python"):
        (tools / name).write_text("#!/bin/bash\nexit 1\n")
        (tools / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "CASP_VENV": str(tmp_path / "venv")}
    command = ["bash", str(repository / "setup.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: CASP needs Python 3.11 or newer and finds none in PATH: install one and run this again\n"
    )
    assert not (tmp_path / "venv").exists()


def test_unknown_arguments(setup):
    done, installed = setup("devel")
    assert done.returncode == 2
    assert "usage: bash setup.sh [dev]" in done.stderr
    assert installed == []
