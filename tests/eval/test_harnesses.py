"""lm-eval and lmms-eval run on our checkpoints, on task files of our own; each part needs its extra."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from casp_eval import harness, lm_eval, lmms_eval
from casp_eval.loading import open_checkpoint
from casp_eval.questions import answer_loss, answers

from casp.data.sources import evaluation_chats
from casp.errors import UserError

needs_lm_eval = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="needs the extra lm-eval")
needs_lmms_eval = pytest.mark.skipif(not importlib.util.find_spec("lmms_eval"), reason="needs the extra lmms-eval")

CAPITALS = """\
task: casp_capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
PICTURES = """\
task: casp_pictures
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
generation_kwargs: {{max_new_tokens: 3, until: ["zz"]}}
doc_to_visual: !function pictures.shown
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function pictures.judge
metric_list: [{{metric: said, aggregation: !function pictures.joined, higher_is_better: true}}]
"""
CODE = """\
from pathlib import Path
from PIL import Image

def shown(doc):
    return [Image.open(Path({folder!r}) / doc["image"])]

def judge(doc, results):
    return {{"said": results[0]}}

def joined(said):
    return "|".join(said)
"""


@pytest.fixture
def capitals(tmp_path: Path) -> Path:
    """A folder with a multiple-choice task of three questions."""
    rows = [
        {"country": country, "choices": ["Paris", "Rome", "Berlin"], "answer": index}
        for index, country in enumerate(("France", "Italy", "Germany"))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "capitals.yaml").write_text(CAPITALS.format(file=tmp_path / "rows.jsonl"))
    return tmp_path


@pytest.fixture
def picture_task(tmp_path: Path, pictures: Path) -> Path:
    """A folder with the questions of `pictures` as a task of lmms-eval whose figure is the answers themselves."""
    (tmp_path / "pictures.py").write_text(CODE.format(folder=str(pictures.parent)))
    (tmp_path / "pictures.yaml").write_text(PICTURES.format(file=pictures))
    return tmp_path


@needs_lm_eval
def test_lm_eval_knows_the_capitals(demo_llama, capitals, tmp_path):
    output = tmp_path / "figures.json"
    words = ["--tasks", "casp_capitals", "--include-path", capitals, "--limit", 3, "--output", output]
    lm_eval.main(["--model", str(demo_llama), "--device", "cpu", *map(str, words)])
    assert json.loads(output.read_text())["results"]["casp_capitals"]["acc,none"] == 1.0


@needs_lm_eval
def test_lm_eval_scores_what_the_model_itself_says(low_rank_llava, capitals):
    """A compressed multimodal checkpoint: the choice of highest likelihood, computed by hand."""
    checkpoint = open_checkpoint(str(low_rank_llava), "cpu", "float32")
    found = lm_eval.evaluate(checkpoint, ["casp_capitals"], capitals, batch_size=2)
    right = 0
    for index, country in enumerate(("France", "Italy", "Germany")):
        scores = []
        for choice in (" Paris", " Rome", " Berlin"):
            before = f"The capital of {country} is"
            ids = checkpoint.tokenizer(before + choice, return_tensors="pt").input_ids
            with torch.no_grad():
                kept = checkpoint.model(ids).logits[0, :-1].log_softmax(-1)[range(ids.shape[1] - 1), ids[0, 1:]]
            scores.append(kept[-len(choice) :].sum().item())  # one token a character
        right += scores.index(max(scores)) == index
    assert found["casp_capitals"]["acc,none"] == pytest.approx(right / 3)


@needs_lmms_eval
def test_lmms_eval_gets_the_answers_that_questions_sh_gets(low_rank_llava, pictures, picture_task):
    checkpoint = open_checkpoint(str(low_rank_llava), "cpu", "float32")
    items = evaluation_chats(str(pictures), 0, 0)
    expected = [text.partition("zz")[0].strip() for text in answers(checkpoint, items, 1, 3)]
    for batch_size in (1, 4):
        found = lmms_eval.evaluate(checkpoint, ["casp_pictures"], picture_task, batch_size=batch_size)
        assert found["casp_pictures"]["said,none"] == "|".join(expected)


@needs_lmms_eval
def test_lmms_eval_finds_the_plug_in(tiny_llava):
    code = "from lmms_eval.models import get_model; print(get_model('casp').__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "casp_eval.lmms_model"


@needs_lmms_eval
def test_the_plug_in_scores_answers(tiny_llava, pictures):
    from casp_eval.lmms_model import CaspModel
    from lmms_eval.api.instance import Instance

    items = evaluation_chats(str(pictures), 0, 0)
    model = CaspModel(str(tiny_llava), device="cpu", dtype="float32")
    model.task_dict = {"task": {"test": items}}
    requests = [
        Instance(
            "loglikelihood",
            (item.asked()[0].text(), " " + item.answer(), lambda doc: doc.pictures(), index, "task", "test"),
            0,
            {"task": "task", "doc_id": index, "repeats": 1},
        )
        for index, item in enumerate(items)
    ]
    scores = model.loglikelihood(requests)
    for item, (loss, greedy) in zip(items, scores, strict=True):
        assert loss == pytest.approx(answer_loss(model.checkpoint, [item], 1)[0], rel=1e-5)
        assert not greedy
    requests[0].arguments = ("?", " x", lambda doc: ["video.mp4"], 0, "task", "test")
    with pytest.raises(UserError, match="only pictures"):
        model.loglikelihood(requests[:1])
    with pytest.raises(UserError, match="several rounds"):
        model.generate_until_multi_round([])


@pytest.mark.parametrize(("main", "module"), [(lm_eval.main, "lm_eval"), (lmms_eval.main, "lmms_eval")])
def test_bad_input(main, module, refused, tiny_llava, tmp_path, monkeypatch):
    words = ["--model", tiny_llava, "--tasks", "casp_nothing", "--device", "cpu"]
    assert "does not exist" in refused(main, "--model", "/nowhere/model", "--tasks", "x")
    assert "--limit" in refused(main, *words, "--limit", 0)
    if importlib.util.find_spec(module):
        assert "'casp_nothing' is unknown" in refused(main, *words)
        assert "is no folder" in refused(main, *words, "--include-path", tmp_path / "nothing")
        assert "names no task" in refused(main, *words[:3], ",")
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert "is not installed; install the extra: pip install -r requirements-" in refused(main, *words)
