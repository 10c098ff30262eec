"""Every script of every room: its flags exist, --help explains them, a misspelt model ends in one sentence."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# The evaluation's package imports the modules that are run here as main modules.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package:RuntimeWarning")

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    Path("compress.sh"),
    Path("plan.sh"),
    *sorted(path.relative_to(ROOT) for path in ROOT.glob("*/scripts/*.sh")),
]
#: What a script needs besides its defaults, with a model that does not exist.
MISSPELT = "/nowhere/lama"
NEEDS = {
    "calibration_mix.sh": ["--model", MISSPELT, "--work", "out", "--output", "out.json", "demo-mixed@1"],
    "compare.sh": [MISSPELT, "--output", "out"],
    "divergence.sh": ["--model", MISSPELT, "--original", MISSPELT],
    "lm_eval.sh": ["--model", MISSPELT, "--tasks", "any"],
    "lmms_eval.sh": ["--model", MISSPELT, "--tasks", "any"],
    "scale.sh": ["--model", MISSPELT, "--output", "out", "--cases"],
    "compress.sh": ["--model", MISSPELT, "--backend", "gptq"],
    "plan.sh": ["--model", MISSPELT, "--backend", "gptq"],
    "prices.sh": ["--backend", "gptq", "--model", MISSPELT, "--moments", "moments", "--output", "out.json"],
    "casp_vs_baseline.sh": None,  # takes built-in models
    "memory.sh": None,  # makes its own models
    "paper_tables.sh": None,  # names its models by rows
    "time.sh": None,
    "speed.sh": None,  # and its own layers
}


def bad_arguments(script: Path) -> list[str]:
    """Arguments that name a model which does not exist; the test is skipped for a script that takes none."""
    words = NEEDS.get(script.name, ["--model", MISSPELT])
    if words is None:
        pytest.skip("takes no model")
    return words


@pytest.fixture
def command_of(tmp_path: Path):
    """What a script runs: [module, flags...], told by a copy of it that finds a Python which only prints."""

    def find(script: Path) -> list[str]:
        copy = tmp_path / "repository" / script
        copy.parent.mkdir(parents=True)
        shutil.copy(ROOT / script, copy)
        shutil.copy(ROOT / "python.sh", tmp_path / "repository")
        python = tmp_path / "repository/.venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
        python.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if name != "CASP_VENV"}
        done = subprocess.run(
            ["bash", str(copy), "last word"], cwd="/", env=environment, capture_output=True, text=True, check=True
        )
        option, module, *flags, last = done.stdout.splitlines()
        assert (option, last) == ("-m", "last word")  # "$@" comes after the defaults, which it overrules, unsplit
        return [module, *flags]

    return find


def test_the_environment_is_the_one_that_casp_venv_names(tmp_path: Path):
    python = tmp_path / "my environment/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\necho mine "$@"\n')
    python.chmod(0o755)
    command = ["bash", str(ROOT / "python.sh"), "-m", "module"]

    def run(folder: Path) -> subprocess.CompletedProcess:
        environment = os.environ | {"CASP_VENV": str(folder)}
        return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)

    assert run(tmp_path / "my environment").stdout == "mine -m module\n"
    done = run(tmp_path / "misspelt")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: CASP_VENV={tmp_path / 'misspelt'} holds no bin/python; make the environment with setup.sh or unset "
        "CASP_VENV.\n"
    )


def run_here(command: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of `python -m COMMAND`, run in this process, which has already imported torch."""
    monkeypatch.setattr(sys, "argv", ["python", *command[1:]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    return ended.value.code or 0


def assert_one_sentence(status: int, out: str, err: str) -> None:
    """What bad input must end in: status 2, one line on stderr that names the model, no traceback."""
    assert status == 2, err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert MISSPELT in err
    assert "Traceback" not in out + err


def test_all_rooms_have_scripts():
    found = {str(script) for script in SCRIPTS}
    assert found >= {
        "SVD/scripts/svd_llava.sh",
        "SVD/scripts/svd_llama.sh",
        "GPTQ/scripts/quantize_llava.sh",
        "GPTQ/scripts/quantize_llama.sh",
        "quip-sharp/scripts/hessian_offline_llava.sh",
        "quip-sharp/scripts/hessian_offline_llama.sh",
        "quip-sharp/scripts/hfize_llava.sh",
        "quip-sharp/scripts/hfize_llama.sh",
        "quip-sharp/scripts/quantize_finetune_llava.sh",
        "quip-sharp/scripts/quantize_finetune_llama.sh",
        "eval/scripts/compare.sh",
        "eval/scripts/chat.sh",
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_shell(script: Path):
    text = (ROOT / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_explains_the_flags_that_the_script_passes(script: Path, command_of, monkeypatch, capsys):
    command = command_of(script)
    monkeypatch.setenv("COLUMNS", "300")
    assert run_here([*command, "--help"], monkeypatch) == 0
    out, err = capsys.readouterr()
    assert err == ""
    explained: dict[str, str] = {}
    for line in out.partition("options:")[2].splitlines():
        if line.startswith("  -"):
            flag = line.split()[0].rstrip(",")
            explained[flag] = ""
        if line[22:24] == "  ":  # argparse explains a flag from column 24 on, in its line or below
            explained[flag] += line[24:]
    assert all(flag in explained for flag in command if flag.startswith("--"))
    assert all(explained.values()), f"without an explanation: {[flag for flag, text in explained.items() if not text]}"


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_flag_that_no_parser_has(script: Path, command_of, monkeypatch, capsys):
    command = [*command_of(script), *(NEEDS.get(script.name) or ["--output", "out"]), "--no-such-flag"]
    if script.name in ("chat.sh", "demo.sh", "perplexity.sh", "questions.sh"):
        command[1:] = ["--model", MISSPELT, "--no-such-flag"]
    assert run_here(command, monkeypatch) == 2
    assert "--no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_misspelt_model(script: Path, command_of, tmp_path: Path, monkeypatch, capsys):
    words = bad_arguments(script)
    command = [*command_of(script), *words]
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    status = run_here(command, monkeypatch)  # reaching the model shows that all flags of the script were understood
    assert_one_sentence(status, *capsys.readouterr())
    assert list(empty.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_misspelt_model_in_the_shell(script: Path, tmp_path: Path):
    command = ["bash", str(ROOT / script), *bad_arguments(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert_one_sentence(done.returncode, done.stdout, done.stderr)
    assert list(tmp_path.iterdir()) == []
