"""lm-eval and lmms-eval run on our checkpoints, on task files of our own; each part needs its extra."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from casp_eval import harness, lm_eval, lmms_eval, tasks
from casp_eval.loading import open_checkpoint
from casp_eval.questions import accuracy, answer_loss, answers

from casp.data.chats import Chat, Video
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
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "capitals.yaml").write_text(CAPITALS.format(file=folder / "rows.jsonl"))
    return folder


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
@pytest.mark.parametrize("chat", [False, True])
def test_lmms_eval_gets_the_answers_that_questions_sh_gets(low_rank_llava, pictures, picture_task, chat):
    checkpoint = open_checkpoint(str(low_rank_llava), "cpu", "float32")
    items = evaluation_chats(str(pictures), 0, 0)
    expected = [text.partition("zz")[0].strip() for text in answers(checkpoint, items, 1, 3)]
    for batch_size in (1, 4):
        found = lmms_eval.evaluate(checkpoint, ["casp_pictures"], picture_task, batch_size=batch_size, chat=chat)
        assert found["casp_pictures"]["said,none"] == "|".join(expected)


@needs_lmms_eval
@pytest.mark.parametrize(("chat", "name"), [(False, "CaspModel"), (True, "CaspChatModel")])
def test_lmms_eval_finds_the_plug_in(chat, name):
    code = f"from lmms_eval.models import get_model; print(get_model('casp', force_simple={not chat}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"casp_eval.lmms_model.{name}" in done.stdout.splitlines()[-1]


def shown_by(item):
    """Pictures and videos of a question, opened."""
    return [*item.opened().pictures(), *item.opened().videos()]


def requests_of(items, kind="generate_until", chat=False, media=shown_by):
    """The documents of `items` as lmms-eval hands them over; `media`: what its task shows of one."""
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.task import ConfigurableMessagesTask

    settings = {"max_new_tokens": 3}

    def messages(item):
        return ConfigurableMessagesTask._build_user_turn(media(item), item.asked()[0].text())

    for index, item in enumerate(items):
        if chat:
            arguments = ("", messages, settings, index, "task", "test")
        else:
            said = " " + item.answer() if kind == "loglikelihood" else settings
            arguments = (item.asked()[0].text(), said, media, index, "task", "test")
        yield Instance(kind, arguments, 0, {"task": "task", "doc_id": index, "repeats": 1})


def plug_in(checkpoint, items, chat=False, **settings):
    from casp_eval.lmms_model import CaspChatModel, CaspModel

    model = (CaspChatModel if chat else CaspModel)(checkpoint, **settings)
    model.task_dict = {"task": {"test": items}}
    return model


@needs_lmms_eval
def test_both_interfaces_and_questions_sh_give_the_model_the_same(tiny_llava, pictures, monkeypatch):
    checkpoint = open_checkpoint(str(tiny_llava), "cpu", "float32")
    items = evaluation_chats(str(pictures), 0, 0)
    seen = []
    generate = checkpoint.model.generate
    monkeypatch.setattr(checkpoint.model, "generate", lambda **inputs: seen.append(inputs) or generate(**inputs))

    given = [answers(checkpoint, items, 4, 3)]
    for chat in (False, True):
        model = plug_in(checkpoint, items, chat, batch_size=4)
        given.append(model.generate_until(list(requests_of(items, chat=chat))))
    assert given[0] == given[1] == given[2]
    assert len(seen) == 6
    for own, simple, chat in zip(seen[:2], seen[2:4], seen[4:], strict=True):
        for name in ("input_ids", "attention_mask", "pixel_values"):
            assert torch.equal(own[name], simple[name])
            assert torch.equal(own[name], chat[name])


@needs_lmms_eval
def test_paths_of_pictures_and_videos_become_what_a_jsonl_names(tiny_llava, pictures):
    from casp_eval.lmms_model import CaspChatModel

    checkpoint = open_checkpoint(str(tiny_llava), "cpu", "float32")
    items = evaluation_chats(str(pictures), 0, 0)[:1]
    shown = [str(pictures.parent / "0.png"), "clip.mp4", {"type": "image", "path": str(pictures.parent / "1.png")}]
    expected = (
        pictures.parent / "0.png",
        Video(Path("clip.mp4")),
        pictures.parent / "1.png",
        items[0].asked()[0].text(),
    )
    for chat in (False, True):
        model = plug_in(checkpoint, items, chat)
        assert isinstance(model, CaspChatModel) == chat
        request = next(requests_of(items, chat=chat, media=lambda item: shown))
        assert model._chat(request).turns[0].parts == expected


@needs_lmms_eval
@pytest.mark.parametrize("chat", [False, True])
def test_what_cannot_be_shown_is_refused(tiny_llava, tiny_llama, pictures, chat):
    items = evaluation_chats(str(pictures), 0, 0)[:1]
    model = plug_in(open_checkpoint(str(tiny_llava), "cpu", "float32"), items, chat)
    for shown, words in (
        ([{"video_start": 1, "url": "a.mp4"}], "whole video files"),
        (["a.wav"], "shows audio"),
        (["missing.mp4"], "missing.mp4"),
    ):
        with pytest.raises(UserError, match=words):
            model.generate_until(list(requests_of(items, chat=chat, media=lambda item, shown=shown: shown)))
    with pytest.raises(UserError, match="several rounds"):
        model.generate_until_multi_round([])
    text_only = plug_in(open_checkpoint(str(tiny_llama), "cpu", "float32"), items, chat)
    with pytest.raises(UserError, match="text-only model"):
        text_only.generate_until(list(requests_of(items, chat=chat)))


@needs_lmms_eval
def test_the_plug_in_scores_answers(tiny_llava, pictures):
    items = evaluation_chats(str(pictures), 0, 0)
    model = plug_in(open_checkpoint(str(tiny_llava), "cpu", "float32"), items)
    scores = model.loglikelihood(list(requests_of(items, "loglikelihood")))
    for item, (loss, greedy) in zip(items, (score.text for score in scores), strict=True):
        assert loss == pytest.approx(answer_loss(model.checkpoint, [item], 1)[0], rel=1e-5)
        assert not greedy


@needs_lmms_eval
def test_multiple_choice_takes_the_likeliest_answer(tiny_llama, capitals):
    """All right where the key says what has the least loss; with the other sign, all wrong."""
    checkpoint = open_checkpoint(str(tiny_llama), "cpu", "float32")
    rows = [json.loads(line) for line in (capitals / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        asked = f"The capital of {row['country']} is"
        losses = [answer_loss(checkpoint, [Chat.about([], asked, one, "")], 1)[0] for one in row["choices"]]
        row["answer"] = losses.index(min(losses))
    (capitals / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert lmms_eval.evaluate(checkpoint, ["casp_capitals"], capitals)["casp_capitals"]["acc,none"] == 1.0
    with pytest.raises(UserError, match="generation only"):
        lmms_eval.evaluate(checkpoint, ["casp_capitals"], capitals, chat=True)


@pytest.mark.slow
@needs_lmms_eval
@pytest.mark.parametrize("chat", [False, True])
def test_the_built_in_task_of_lmms_eval_gives_what_questions_sh_gives(demo_llava, chat):
    checkpoint = open_checkpoint(str(demo_llava), "cpu", "float32")
    items = evaluation_chats("test", 0, 0)
    expected = accuracy(items, answers(checkpoint, items, 16, 8))["accuracy"]
    name = "casp_images_test"
    found = lmms_eval.evaluate(checkpoint, [name], tasks.LMMS_EVAL, batch_size=16, chat=chat)
    assert found[name]["exact,none"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
@needs_lm_eval
def test_the_built_in_task_of_lm_eval_gives_what_questions_sh_gives(demo_llava):
    checkpoint = open_checkpoint(str(demo_llava), "cpu", "float32")
    items = evaluation_chats("test", 0, 0)
    expected = accuracy(items, answers(checkpoint, items, 16, 8))["accuracy"]
    name = "casp_images_test"
    found = lm_eval.evaluate(checkpoint, [name], tasks.LM_EVAL, batch_size=16, chat=True, images=True)
    assert found[name]["exact,none"] == pytest.approx(expected, abs=1e-9)


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
