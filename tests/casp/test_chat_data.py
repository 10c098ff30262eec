"""Chats with pictures: what becomes of rows, turns, answers and padding, and which are refused."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from drawn import batches, decoded, rows_of
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaNextConfig,
    LlavaNextProcessor,
)

from casp.data import calibration_batches, fingerprint
from casp.data.chats import chats_fingerprint, read_samples
from casp.data.sources import BUILT_IN_CHATS, evaluation_chats, evaluation_text
from casp.errors import UserError
from casp.model.batch import Batch
from casp.reading.pictures import open_picture


def test_chats_become_padded_batches_with_right_masks(tiny_llava: Path, chat_file: Path):
    found = batches(tiny_llava, chat_file, samples=10, batch_size=4)
    pad = AutoTokenizer.from_pretrained(tiny_llava).pad_token_id
    for ids, mask in rows_of(found):
        assert (mask == (ids != pad)).all()
        assert (mask.diff() <= 0).all()  # padded on the right only
        assert (ids == 3).sum() == 16  # the image tokens of one picture
    assert sum(batch["pixel_values"].shape[0] for batch in found) == 10
    texts = "".join(decoded(tiny_llava, found))
    assert all(f"what is {number}?" in texts and "x" * (1 + 3 * number) in texts for number in range(10))


def said(folder: Path, found: list[Batch]) -> list[str]:
    """What stands where a batch says that the assistant speaks, a text a chat."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [ids[spoken] for batch in found for ids, spoken in zip(batch["input_ids"], batch.answers, strict=True)]
    return [tokenizer.decode(row) for row in rows]


def test_answers_are_told_from_questions(tiny_llava: Path, chat_file: Path):
    found = batches(tiny_llava, chat_file, samples=10, batch_size=4)
    answers = sorted(chat.answer() for chat in read_samples(chat_file)[1])
    assert sorted(text.strip() for text in said(tiny_llava, found)) == answers
    for batch in found:
        assert batch.answers.shape == batch["input_ids"].shape
        assert not (batch.answers & ~batch["attention_mask"].bool()).any()


@pytest.mark.parametrize("begins", [(), ({"role": "system", "content": "be brief"},)])
def test_every_turn_of_the_assistant_counts(tiny_llama: Path, tmp_path: Path, begins: tuple[dict[str, str], ...]):
    turns = [("user", "who?"), ("assistant", "me"), ("user", "me or you?"), ("assistant", "you")]
    row = {"messages": [*begins, *({"role": role, "content": text} for role, text in turns)]}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (text,) = said(tiny_llama, batches(tiny_llama, file, samples=1))
    assert text.split() == ["me", "you"]


def test_the_answers_of_the_built_in_llava(demo_llava: Path):
    found = calibration_batches(demo_llava, "demo-images", 12, 512, 0, 3)
    scenes_of = [BUILT_IN_CHATS["demo-images"].question("calibration", i).answer for i in range(96)]
    assert {text.strip().removesuffix("<|im_end|>") for text in said(demo_llava, found)} <= set(scenes_of)


def test_padding_changes_no_logits(tiny_llava: Path, chat_file: Path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    padded = {}
    for batch in batches(tiny_llava, chat_file, samples=10, batch_size=5):
        for ids, mask, logits in zip(batch["input_ids"], batch["attention_mask"], model(**batch).logits, strict=True):
            padded[tuple(ids[mask.bool()].tolist())] = logits[mask.bool()]
    for batch in batches(tiny_llava, chat_file, samples=10, batch_size=1):
        expected = padded[tuple(batch["input_ids"][0].tolist())]
        torch.testing.assert_close(model(**batch).logits[0], expected, atol=1e-4, rtol=1e-4)


def test_chats_of_like_length_share_a_batch(tiny_llava: Path, chat_file: Path):
    found = batches(tiny_llava, chat_file, samples=10, batch_size=2)
    assert all((batch["attention_mask"] == 0).sum() <= 3 for batch in found)  # neighbours differ by 3 tokens


def test_the_seed_chooses_the_rows(tiny_llava: Path, chat_file: Path):
    first = fingerprint(batches(tiny_llava, chat_file, samples=5, seed=1))
    assert first == fingerprint(batches(tiny_llava, chat_file, samples=5, seed=1))
    assert first != fingerprint(batches(tiny_llava, chat_file, samples=5, seed=2))


def test_other_outputs_of_a_processor_pass_through(tiny_llava: Path, tmp_path: Path, chat_file: Path):
    """LLaVA-NeXT cuts a picture into tiles and tells the model its size in `image_sizes`."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    llava, config = AutoProcessor.from_pretrained(tiny_llava), AutoConfig.from_pretrained(tiny_llava)
    LlavaNextConfig(vision_config=config.vision_config, text_config=config.text_config).save_pretrained(
        tmp_path / "next"
    )
    tiles = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 64], [64, 32]]
    )
    LlavaNextProcessor(
        tiles,
        llava.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=llava.chat_template,
    ).save_pretrained(tmp_path / "next")
    found = batches(tmp_path / "next", chat_file, samples=10, batch_size=4)
    assert sum(len(batch["image_sizes"]) for batch in found) == 10
    assert all(batch["pixel_values"].shape[:2] == (len(batch["input_ids"]), 3) for batch in found)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 3 of .* is not valid JSON"),
        ("[1, 2]", "line 3 of .* does not hold a JSON object"),
        ('{"image": "0.png", "question": "q"}', "line 3 of .* has none of"),
        ('{"image": "0.png", "question": "q", "answer": null}', "line 3 of .* has no text in quotes"),
        ('{"image": ["0.png"], "question": "q", "answer": "a"}', "line 3 of .* has no text in quotes"),
        ('{"images": "0.png", "question": "q", "answer": "a"}', "line 3 of .* has no list as 'images'"),
        ('{"images": ["0.png", 1], "question": "q", "answer": "a"}', "line 3 of .* has no text in quotes"),
        ('{"video": "0.mp4", "question": "q", "answer": "a"}', "line 3 of .*: the video .*0.mp4 cannot be read"),
        ('{"audio": "0.wav", "question": "q", "answer": "a"}', "line 3 of .* has sound"),
        ('{"videos": ["0.mp4"], "question": "q", "answer": "a"}', "line 3 of .* names videos where that is not read"),
        ('{"text": "a picture", "image": "0.png"}', "line 3 of .* names image where that is not read"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}], "images": ["0.png"]}',
            "line 3 of .* names images where that is not read",
        ),
        ('{"messages": "hello"}', "line 3 of .* has no list of objects as 'messages'"),
        ('{"messages": [{"role": "robot", "content": "hello"}]}', "line 3 of .* role is none of system, user"),
        (
            '{"messages": [{"role": "user", "content": "hello"}]}',
            "line 3 of .* does not end with text of the assistant",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "audio", "audio": "0.wav"}]}]}',
            "line 3 of .* neither text, image nor video",
        ),
        ('{"image": "none.png", "question": "q", "answer": "a"}', "line 3 of .*none.png cannot be read .no such file"),
        ('{"image": "chats.jsonl", "question": "q", "answer": "a"}', "line 3 of .* does not open"),
    ],
)
def test_bad_rows_are_named(tiny_llava: Path, chat_file: Path, line: str, message: str):
    lines = chat_file.read_text().splitlines()
    lines[2] = line
    chat_file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        batches(tiny_llava, chat_file, samples=10)


def test_truncated_image(tiny_llava: Path, chat_file: Path):
    picture = chat_file.parent / "4.png"
    picture.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(UserError, match=r"line 5 of .*4.png does not open"):
        batches(tiny_llava, chat_file, samples=10)


def test_too_few_or_no_rows(tiny_llava: Path, chat_file: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"has only 10 chats for 11 samples"):
        batches(tiny_llava, chat_file, samples=11)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty.jsonl has no usable rows"):
        batches(tiny_llava, tmp_path / "empty.jsonl")


def test_a_chat_longer_than_the_model(tiny_llava: Path, chat_file: Path):
    lines = chat_file.read_text().splitlines()
    lines[6] = json.dumps({"image": "6.png", "question": "q" * 600, "answer": "a"})
    chat_file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"line 7 of .* makes 6.. tokens, more than the model's 512"):
        batches(tiny_llava, chat_file, samples=10)


def test_kinds_of_rows_mix_in_one_file(tiny_llava: Path, chat_file: Path):
    """Each kind gives samples by its share of the rows; messages say what the same question and answer say."""
    turns = [
        {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "what is 0?"}]},
        {"role": "assistant", "content": "xyz"},
    ]
    rows = [{"text": "t" * 400}, {"text": "u" * 400}, {"messages": turns}]
    rows += [{"images": ["1.png", "2.png"], "question": "which?", "answer": "both"}]
    rows += [{"question": "without a picture?", "answer": "yes"}] * 2
    path = chat_file.parent / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = batches(tiny_llava, path, samples=6, sequence_length=100, batch_size=2)
    pictured = [batch for batch in found if "pixel_values" in batch]
    assert sorted(n for batch in pictured for n in (batch["input_ids"] == 3).sum(1).tolist()) == [16, 32]
    assert sum(len(batch["pixel_values"]) for batch in pictured) == 3
    said = [text.replace("<pad>", "") for text in decoded(tiny_llava, found)]
    assert sum(set(text) <= set("tu\n") for text in said) == 2
    assert sum(text.count("without a picture?") for text in said) == 2
    asked = chat_file.parent / "asked.jsonl"
    asked.write_text(json.dumps({"image": "0.png", "question": "what is 0?", "answer": "xyz"}))
    (alone,) = batches(tiny_llava, asked, samples=1)
    assert any(torch.equal(ids[mask.bool()], alone["input_ids"][0]) for ids, mask in rows_of(found))
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    assert all(model(**batch).logits.isfinite().all() for batch in found)


def test_chats_without_pictures_for_a_text_model(tiny_llama: Path, tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    turns = [{"role": role, "content": role[0] * 3} for role in ("system", "user", "assistant", "user", "assistant")]
    path.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"question": "why?", "answer": "so"}))
    found = batches(tiny_llama, path, samples=2, batch_size=2)
    assert sorted(text.replace("<pad>", "") for text in decoded(tiny_llama, found)) == [
        "system: sss\nuser: uuu\nassistant: aaa\nuser: uuu\nassistant: aaa\n",
        "user: why?\nassistant: so\n",
    ]
    assert all((mask.diff() <= 0).all() for _, mask in rows_of(found))


def test_one_file_serves_calibration_and_evaluation(chat_file: Path):
    chat_file.write_text(chat_file.read_text() + json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"}))
    assert evaluation_text(str(chat_file)) == "one\n\ntwo"
    chats = evaluation_chats(str(chat_file), 0, 0)
    assert [chat.answer() for chat in chats] == ["x" * (1 + 3 * number) for number in range(10)]
    assert [chat.opened().pictures()[0].size for chat in chats] == [(30 + number, 40) for number in range(10)]
    assert len({chats_fingerprint([chat]) for chat in chats}) == 10
    chat_file.write_text('{"text": "one"}')
    with pytest.raises(UserError, match="has no questions"):
        evaluation_chats(str(chat_file), 0, 0)


@pytest.mark.parametrize("wanted", ["calibration", "evaluation"])
def test_pictures_of_one_batch_at_a_time_are_in_memory(tiny_llava: Path, chat_file: Path, monkeypatch, wanted):
    """A file of thousands of photographs must not be decoded as a whole; neither for calibration nor for its hash."""
    alive, most = 0, 0

    def dropped():
        nonlocal alive
        alive -= 1

    def opened(*args):
        nonlocal alive, most
        weakref.finalize(picture := open_picture(*args), dropped)
        alive += 1
        most = max(most, alive)
        return picture

    monkeypatch.setattr("casp.data.chats.open_picture", opened)
    if wanted == "calibration":
        batches(tiny_llava, chat_file, samples=10, batch_size=3)
    else:
        chats_fingerprint(evaluation_chats(str(chat_file), 0, 0))
    assert 1 <= most <= 4


def test_images_for_a_text_model(tiny_llama: Path, chat_file: Path):
    with pytest.raises(UserError, match=r"has images, but .* is a text model"):
        batches(tiny_llama, chat_file)


def test_a_folder_without_processor(tiny_llava: Path, chat_file: Path, tmp_path: Path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tiny_llava / "config.json").read_text())
    with pytest.raises(UserError, match=r"cannot load the processor of .*copy the original model's"):
        batches(tmp_path / "bare", chat_file)
