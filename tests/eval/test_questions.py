"""Questions about images: answer perplexity, exact match, intervals, the files they come from."""

import json
import math

import pytest
import torch
from casp_eval.loading import open_checkpoint
from casp_eval.questions import accuracy, answer_length, answer_loss, answers, main, normalise, wilson
from scipy.stats import binomtest
from transformers import AutoModelForImageTextToText, AutoProcessor

from casp.data.chats import Chat
from casp.data.sources import evaluation_chats
from casp.errors import UserError


@pytest.fixture(scope="module")
def items(pictures) -> list[Chat]:
    return evaluation_chats(str(pictures), 0, 0)


@pytest.fixture(scope="module")
def llava(tiny_llava):
    return open_checkpoint(str(tiny_llava), "cpu", "float32")


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe, Stat. Med. 17 (1998), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_published_intervals(right, asked, low, high):
    assert wilson(right, asked) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_an_answer_that_is_empty_because_logits_are_nan_is_an_error(tiny_llava, items):
    checkpoint = open_checkpoint(str(tiny_llava), "cpu", "float32")
    checkpoint.model.get_output_embeddings().weight.data[5] = float("nan")
    with pytest.raises(UserError, match="gives NaN or infinity as logits"):
        answers(checkpoint, items, 2, 3)


@pytest.mark.parametrize("asked", [1, 7, 300])
def test_wilson_agrees_with_scipy(asked):
    for right in (0, asked // 2, asked):
        theirs = binomtest(right, asked).proportion_ci(method="wilson")
        assert wilson(right, asked) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_normalise():
    assert [normalise(text) for text in (" A Cat. ", "3", "no .", "e.g.", "")] == ["a cat", "3", "no", "e.g", ""]


def test_accuracy_counts_by_kind(items):
    given = ["A cat.", "dog", "no", "no", "three", "12 "]
    figure = accuracy(items, given)
    assert (figure["accuracy"], figure["questions"]) == (pytest.approx(4 / 6), 6)
    assert {kind: one["accuracy"] for kind, one in figure["kinds"].items()} == {
        "name": 1.0,
        "yes/no": 0.5,
        "count": 0.5,
    }
    assert figure["kinds"]["count"]["interval"] == list(wilson(1, 2))


def test_answer_perplexity_is_that_of_the_answer_tokens(llava, items):
    """Against one question at a time through transformers, the positions of the answer cut out by hand."""
    model, processor = llava.model, llava.processor
    total, count = 0.0, 0
    for item in items:
        before = f"user: <image>\n{item.asked()[0].text()}\nassistant:"
        inputs = processor(text=f"{before} \n{item.answer()}", images=item.opened().pictures(), return_tensors="pt")
        tokens = len(f" \n{item.answer()}")  # one token a character
        with torch.inference_mode():
            scores = model(**inputs).logits[0, :-1].log_softmax(-1)
        wanted = inputs["input_ids"][0, 1:]
        total -= scores[range(len(wanted)), wanted][-tokens:].sum().item()
        count += tokens
    for batch_size in (1, 4, 6):  # batches of questions and answers of different lengths
        loss, tokens = answer_loss(llava, items, batch_size)
        assert (loss, tokens) == (pytest.approx(total / count, rel=1e-5), count)


def test_answers_with_uniform_logits_have_the_vocabulary_as_perplexity(tiny_llava, items):
    checkpoint = open_checkpoint(str(tiny_llava), "cpu", "float32")
    checkpoint.model.get_output_embeddings().weight.data.zero_()
    assert math.exp(answer_loss(checkpoint, items, 3)[0]) == pytest.approx(128, rel=1e-5)


def test_an_answer_begins_where_its_tokens_begin():
    merges = {"A: cat": [5, 9], "A: ": [5, 7], "A:": [5], "ab": [1, 2], "a": [1]}

    class Tokens:
        def __call__(self, text):
            self.input_ids = merges[text]
            return self

    assert answer_length(Tokens(), "A: ", "cat") == 1  # the blank went into the answer's token
    assert answer_length(Tokens(), "A:", " cat") == 1
    assert answer_length(Tokens(), "a", "b") == 1


def test_greedy_answers_do_not_depend_on_the_batch(llava, items):
    alone = answers(llava, items, 1, 6)
    assert answers(llava, items, 4, 6) == alone
    assert len(set(alone)) > 1  # the questions and images matter
    inputs = llava.processor(
        text="user: <image>\nWhat is this?\nassistant:", images=items[0].opened().pictures(), return_tensors="pt"
    )
    with torch.inference_mode():
        first = llava.model(**inputs).logits[0, -1].argmax()
    assert alone[0].startswith(llava.tokenizer.decode([first], skip_special_tokens=True))


def test_sampling_settings_of_a_model_are_not_used(tiny_llava, items, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 3.0
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tiny_llava).save_pretrained(tmp_path)
    own = open_checkpoint(str(tiny_llava), "cpu", "float32")
    assert answers(open_checkpoint(str(tmp_path), "cpu", "float32"), items, 6, 6) == answers(own, items, 6, 6)


def test_the_seed_draws_from_a_long_file(pictures):
    drawn = [[item.asked()[0].text() for item in evaluation_chats(str(pictures), 3, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(evaluation_chats(str(pictures), 9, 0)) == 6


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"image": "0.png", "question": "What?"', "line 1 of"),
        ('{"image": "0.png", "question": "What?"}', "line 1 of"),
        ("[1]", "line 1 of"),
        ('{"image": "0.png", "question": "What?", "answer": " "}', "or a blank one, as 'answer'"),
        ('{"image": "9.png", "question": "What?", "answer": "cat"}', "9.png cannot be read (no such file)"),
        (
            '{"image": "bad.jsonl", "question": "What?", "answer": "cat"}',
            "bad.jsonl does not open (cannot identify image file",
        ),
        ("", "has no usable rows"),
    ],
)
def test_bad_questions_are_named(refused, tiny_llava, tmp_path, row, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(row)
    assert message in refused(main, "--model", tiny_llava, "--dataset", file)


def test_bad_options(refused, tiny_llava, tiny_llama, pictures):
    assert "unknown questions 'nothing'" in refused(main, "--model", tiny_llava, "--dataset", "nothing")
    assert "text-only model (llama)" in refused(main, "--model", tiny_llama, "--dataset", pictures)
    assert "not at least 1" in refused(main, "--model", tiny_llava, "--batch-size", 0)


def test_a_model_without_chat_template(refused, tiny_llava, pictures, tmp_path):
    for file in tiny_llava.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "has no chat template" in refused(main, "--model", tmp_path, "--dataset", pictures)


def test_script_with_every_option(run_script, tiny_llava, pictures, tmp_path):
    output = tmp_path / "figure.json"
    done = run_script(
        *("questions.sh", "--model", tiny_llava, "--dataset", pictures, "--questions", 4, "--batch-size", 3),
        *("--max-new-tokens", 2, "--seed", 1, "--device", "cpu", "--dtype", "float32", "--output", output),
    )
    assert done.returncode == 0, done.stderr
    figure = json.loads(output.read_text())
    assert figure["questions"] == 4
    assert figure["perplexity"] > 1
    assert sum(kind["questions"] for kind in figure["kinds"].values()) == 4


def test_chats_of_any_form_are_answered_as_one_at_a_time(llava, pictures):
    """Several pictures, none, several turns: in batches as alone, in their order."""
    (first, second, *_) = evaluation_chats(str(pictures), 0, 0)
    image = first.pictures()[0]
    plain = Chat.about([], "what is two and two?", "four", "here")
    double = Chat.about([image, second.pictures()[0]], "which?", "both", "here")
    longer = Chat((*first.turns, *plain.turns), "here")
    chats = [first, plain, double, longer, plain, second]
    assert answers(llava, chats, 4, 3) == [answers(llava, [chat], 1, 3)[0] for chat in chats]
    losses = [answer_loss(llava, [chat], 1) for chat in chats]
    loss, tokens = answer_loss(llava, chats, 4)
    assert tokens == sum(count for _, count in losses)
    assert loss == pytest.approx(sum(one * count for one, count in losses) / tokens, rel=1e-5)


@pytest.mark.parametrize("split", ["validation", "test", "test-unseen"])
def test_built_in_questions(split):
    rows = evaluation_chats(split, 12, 0)
    assert len(rows) == 12
    assert len({row.kind for row in rows}) == 6
