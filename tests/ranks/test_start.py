"""CASP_PROCESSES starts what several processes can share in as many of them, and everything else as one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from casp_entry.torchrun import is_shared
from small_stages import SMALL, contents, tiny_inputs

from casp import job

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("word", ["abc", "0", "-1", "1.5", "99999", "²"])
def test_casp_processes_is_a_number_of_processes(word):
    command = ["bash", str(ROOT / "plan.sh"), "--help"]
    done = subprocess.run(command, env=os.environ | {"CASP_PROCESSES": word}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: CASP_PROCESSES={word} is no number of processes; give 1 to 1024.\n"


def test_stages_are_shared_and_what_answers_or_starts_others_is_not():
    stages = ["casp.moments", "casp.plan", "casp_svd", "casp_gptq", "casp_quip_sharp", "casp_aqlm"]
    figures = [f"casp_eval.{name}" for name in ("compare", "divergence", "perplexity", "questions")]
    assert all(is_shared(["-m", module, "--help"]) for module in stages + figures)
    alone = ["casp.job", "casp_eval.chat", "casp_eval.lm_eval", "casp_gptq.compare_gptqmodel", "pytest", "ruff"]
    assert not any(is_shared(["-m", module, "--help"]) for module in alone)
    assert not is_shared(["-c", "pass"])


def test_what_is_one_process_is_started_as_that():
    command = [sys.executable, "-m", "casp_entry.torchrun", "-c", "import sys; print(sys.argv)", "last word"]
    done = subprocess.run(command, env=os.environ | {"CASP_PROCESSES": "3"}, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("['-c', 'last word']\n", 0)


def test_compress_starts_its_stages_in_several_processes(tmp_path, capsys):
    model, text = tiny_inputs(tmp_path)
    flags = ["--model", str(model), "--dataset", str(text), *SMALL, "--backend", "quip-sharp", "--dry-run"]
    places = ["--output", str(tmp_path / "out"), "--moments", str(tmp_path / "moments")]
    steps = job.todo(job.parser().parse_args([*flags, *places, "--ft-epochs", "1"]), 2)
    assert [step.started(2)[2] for step in steps] == ["casp_entry.torchrun"] * 3
    assert all(step.started(1) == step.command for step in steps)
    assert capsys.readouterr().out.count("in 2 processes") == 3


@pytest.mark.slow
def test_the_whole_job_in_two_processes_as_a_user_types_it(tmp_path):
    model, text = tiny_inputs(tmp_path)
    budget = ["--backend", "gptq", "--format", "group_size=32", "--bits", "4"]
    places = ["--output", "out", "--moments", "moments", "--costs", "costs"]
    flags = ["--model", str(model), "--dataset", str(text), *SMALL, *budget, *places]
    for count in ("1", "2"):
        folder = tmp_path / count
        folder.mkdir()
        environment = os.environ | {"CASP_PROCESSES": count, "OMP_NUM_THREADS": "1"}
        subprocess.run(["bash", str(ROOT / "compress.sh"), *flags], cwd=folder, env=environment, check=True)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    shutil.rmtree(tmp_path / "2")
    (tmp_path / "2").mkdir()
    text.write_text("short")
    stage = ["bash", str(ROOT / "quip-sharp/scripts/hessian_offline_llama.sh"), *flags[:-8], "--output", "out"]
    done = subprocess.run(stage, cwd=tmp_path / "2", env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "has 5 tokens" in done.stderr
