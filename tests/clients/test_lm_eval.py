"""lm-eval's own command line on a checkpoint, CASP installed but not imported (slow: needs the extra lm-eval)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval")

CHOICES = [" Paris", " Rome"]
TASK = """\
task: casp_capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["Paris", "Rome"]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def asked(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder with a task of two questions, and the questions."""
    questions = ["The capital of France is", "Paris or Rome:"]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"question": one}) for one in questions))
    (folder / "capitals.yaml").write_text(TASK.format(file=folder / "rows.jsonl"))
    return folder, questions


def run(folder: Path, tasks: Path, output: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    words = ["run", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--tasks", "casp_capitals"]
    words += ["--include_path", str(tasks), "--device", "cpu", "--log_samples", "--output_path", str(output)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(output.parent / "home")} | variables
    return subprocess.run([sys.executable, "-m", "lm_eval", *words], env=environment, capture_output=True, text=True)


def test_its_scores_are_the_compressed_models(gptq: Path, asked: tuple[Path, list[str]], tmp_path: Path):
    tasks, questions = asked
    done = run(gptq, tasks, tmp_path / "output")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "output").rglob("samples_casp_capitals_*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    found = [float(answer[0][0]) for sample in samples for answer in sample["resps"]]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gptq), AutoTokenizer.from_pretrained(gptq)
    expected = []
    for question in questions:
        for choice in CHOICES:
            ids = tokenizer(question + choice, return_tensors="pt").input_ids
            with torch.no_grad():
                said = model(ids).logits[0, :-1].log_softmax(-1)[range(ids.shape[1] - 1), ids[0, 1:]]
            expected.append(said[-len(choice) :].sum().item())  # one token a character
    assert found == pytest.approx(expected, rel=1e-3)


def test_it_stops_where_the_hook_is_off(gptq: Path, asked: tuple[Path, list[str]], tmp_path: Path):
    done = run(gptq, asked[0], tmp_path / "output", CASP_NO_HOOK="1")
    assert done.returncode != 0
    assert "Unknown quantization type, got casp" in done.stderr
