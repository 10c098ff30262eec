"""Calibration: the same batches for the same seed, windows that do not overlap, padding that masks show."""

import json
import weakref
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaNextConfig,
    LlavaNextProcessor,
)

from casp.data import calibration_batches, fingerprint
from casp.data.batches import _windows_of_text
from casp.data.chats import chats_fingerprint, read_samples
from casp.data.sources import BUILT_IN_CHATS, evaluation_chats, evaluation_text
from casp.errors import UserError
from casp.model.batch import Batch
from casp.reading.pictures import open_picture


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of 4000 characters (= tokens of the tiny models) in which every place reads differently."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number:04d}\n" for number in range(800)))
    return path


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    """Ten rows of image, question and answer; answers of different lengths; a blank line at the end."""
    rows = []
    for number in range(10):
        Image.new("RGB", (30 + number, 40), (25 * number, 90, 200)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": f"what is {number}?", "answer": "x" * (1 + 3 * number)})
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def batches(folder: Path, dataset: object, samples=8, sequence_length=32, seed=0, batch_size=3):
    """`calibration_batches` with small defaults."""
    return calibration_batches(folder, str(dataset), samples, sequence_length, seed, batch_size)


def decoded(folder: Path, found: list[dict[str, torch.Tensor]]) -> list[str]:
    """The text of every sample."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.decode(ids) for batch in found for ids in batch["input_ids"]]


def rows_of(found: list[dict[str, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, mask) of every sample."""
    return [pair for batch in found for pair in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


# ---- text


def test_text_batches_are_exact_windows_of_the_file(tiny_llama: Path, text_file: Path):
    found = batches(tiny_llama, text_file)
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(3, 32), (3, 32), (2, 32)]
    assert all(batch["attention_mask"].all() for batch in found)
    content = text_file.read_text()
    assert all(text in content for text in decoded(tiny_llama, found))
    AutoModelForCausalLM.from_pretrained(tiny_llama)(**found[0])


def test_the_seed_decides_everything(tiny_llama: Path, text_file: Path):
    first = fingerprint(batches(tiny_llama, text_file, seed=1))
    assert first == fingerprint(batches(tiny_llama, text_file, seed=1))
    assert first != fingerprint(batches(tiny_llama, text_file, seed=2))


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 40),
    samples=st.integers(1, 20),
    spare=st.integers(0, 300),
    rng=st.randoms(use_true_random=False),
)
def test_windows_never_overlap(length: int, samples: int, spare: int, rng):
    def tokenizer(text: str, **_) -> dict:
        return {"input_ids": list(range(len(text)))}  # a token tells its place

    windows = _windows_of_text("x" * (samples * length + spare), "text", tokenizer, samples, length, rng)
    assert all(len(window) == length for window in windows)
    places = torch.cat(windows)
    assert len(places.unique()) == len(places) == samples * length


def test_a_text_that_just_fits_is_used_whole(tiny_llama: Path, text_file: Path):
    found = batches(tiny_llama, text_file, samples=8, sequence_length=500, batch_size=8)
    assert sorted(decoded(tiny_llama, found)) == sorted(
        text_file.read_text()[start : start + 500] for start in range(0, 4000, 500)
    )


def test_jsonl_of_texts(tiny_llama: Path, tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": letter * 99}) for letter in "abcdef"))
    joined = "\n\n".join(letter * 99 for letter in "abcdef")
    assert all(text in joined for text in decoded(tiny_llama, batches(tiny_llama, path)))


def test_text_for_a_multimodal_model(tiny_llava: Path, text_file: Path):
    found = batches(tiny_llava, text_file)
    assert set(found[0]) == {"input_ids", "attention_mask"}
    AutoModelForImageTextToText.from_pretrained(tiny_llava)(**found[0])


# ---- images and text


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


def test_a_text_has_no_answers(tiny_llama: Path, text_file: Path):
    assert all(batch.answers is None for batch in batches(tiny_llama, text_file))


def test_the_answers_of_the_built_in_llava(demo_llava: Path):
    found = calibration_batches(demo_llava, "demo", 12, 512, 0, 3)
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


# ---- built in


def test_built_in_texts_are_of_the_calibration_splits(tiny_llama: Path, tiny_llava: Path, monkeypatch):
    from casp.demo import text

    splits, original = [], text.load
    monkeypatch.setattr(text, "load", lambda split: (splits.append(split), original(split)[:5000])[1])
    found = batches(tiny_llama, "demo-mixed", samples=10)
    assert fingerprint(found) == fingerprint(batches(tiny_llama, "demo-registers", samples=10))
    assert fingerprint(found) == fingerprint(batches(tiny_llava, "demo-registers", samples=10))
    assert splits == [*text.CALIBRATION.values()] * 3


@pytest.mark.parametrize("name", ["demo", "demo-text", "demo-speeches"])
def test_the_speeches_are_cut_as_they_were_when_they_were_all_the_built_in_text(demo_llama: Path, name: str):
    """SHA-256 of the batches of --dataset demo before other registers joined: earlier figures can be made again."""
    found = batches(demo_llama, name, samples=128, sequence_length=512, batch_size=8)
    assert fingerprint(found) == "93d0de41d9293eda5198368110436c54ccee158665424fda8dd2719447b8566b"


def test_built_in_images_are_of_the_calibration_split(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch):
    from casp.demo import scenes

    splits, original = [], scenes.question
    monkeypatch.setattr(scenes, "question", lambda split, i: (splits.append(split), original(split, i))[1])
    found = batches(tiny_llava, "demo-images")
    assert splits == ["calibration"] * 8
    assert sum(len(batch["pixel_values"]) for batch in found) == 8
    assert fingerprint(found) != fingerprint(batches(tiny_llava, "demo-images", seed=1))


def test_the_built_in_llava_takes_its_calibration(demo_llava: Path):
    found = batches(demo_llava, "demo", samples=2, batch_size=2)
    model = AutoModelForImageTextToText.from_pretrained(demo_llava)
    assert all(model(**batch).logits.isfinite().all() for batch in found)


def test_the_built_in_video_model_takes_its_calibration(demo_video: Path):
    found = batches(demo_video, "demo-clips", samples=2, batch_size=2)
    assert [tuple(batch["pixel_values_videos"].shape) for batch in found] == [(2, 4, 3, 96, 96)]
    model = AutoModelForImageTextToText.from_pretrained(demo_video)
    assert all(model(**batch).logits.isfinite().all() for batch in found)
    assert fingerprint(found) != fingerprint(batches(demo_video, "demo-clips", samples=2, batch_size=2, seed=1))


def test_clips_for_a_model_of_pictures_are_refused_by_name(demo_llava: Path):
    with pytest.raises(UserError, match=r"reads no videos, and clip \d+ of demo-clips has one"):
        batches(demo_llava, "demo-clips", samples=2, batch_size=2)


# ---- the hub, played by rows of the real sets' schemas


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Replaces `load_dataset`; returns the list of its calls."""
    calls = []

    def load_dataset(path: str, name: str | None = None, **arguments):
        calls.append({"path": path, "name": name, **arguments})
        streaming = arguments.get("streaming", False)
        if path == "text":
            subset = arguments["data_files"].rsplit("/", 1)[1].removesuffix("_sample.jsonl")
            rows = [{"text": json.dumps({"text": f"{subset} {i} " * (i % 40), "meta": {}})} for i in range(400)]
        elif path == "allenai/c4":
            rows = [{"text": f"page {i} " * i, "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for i in range(99)]
        elif path == "Salesforce/wikitext":
            rows = [{"text": row} for row in ["", " = Valkyria = \n", " Senjo no @-@ Valkyria , " * 20] * 9]
        else:
            rows = [{"sentence": "pierre <unk> N years old will join the board"} for _ in range(99)]
        found = datasets.Dataset.from_list(rows)
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("name", ["rp", "c4", "wikitext2", "ptb"])
def test_hub_sets(tiny_llama: Path, hub: list[dict], name: str):
    found = batches(tiny_llama, name, samples=20, seed=3)
    assert sum(len(batch["input_ids"]) for batch in found) == 20
    assert fingerprint(found) == fingerprint(batches(tiny_llama, name, samples=20, seed=3))
    assert fingerprint(found) != fingerprint(batches(tiny_llama, name, samples=20, seed=4))
    assert all(call["split"] == "train" and "trust_remote_code" not in call for call in hub)


def test_rp_mixes_its_parts(tiny_llama: Path, hub: list[dict]):
    texts = decoded(tiny_llama, batches(tiny_llama, "rp", samples=40))
    assert len(hub) == 11
    assert sum("cc_" in text for text in texts) > 10
    assert len({text.strip("0123456789 ").split(" ")[0] for text in texts}) > 5


def test_documents_give_one_window_each(tiny_llama: Path, hub: list[dict]):
    texts = decoded(tiny_llama, batches(tiny_llama, "c4", samples=60))
    pages = [text.split("page ")[1].split(" ")[0] for text in texts]
    assert len(set(pages)) == 60
    with pytest.raises(UserError, match=r"c4 has only .* documents of at least 500 tokens"):
        batches(tiny_llama, "c4", samples=90, sequence_length=500)


@pytest.mark.parametrize("name", ["rp", "c4", "wikitext2", "ptb"])
def test_unreachable_hub_names_the_remedy(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=f"'{name}' from the hub .*--dataset a local .txt or .jsonl file or 'demo'"):
        batches(tiny_llama, name)


def test_a_connection_that_breaks_on_the_way(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    def rows():
        yield {"text": "x" * 99}
        raise ConnectionError("Server disconnected")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(UserError, match="Server disconnected"):
        batches(tiny_llama, "c4")


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"sequence_length": -1}, "sequence length must be at least 1"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"sequence_length": 513}, "more than the 512 positions .*lower --sequence-length"),
        ({"samples": 126}, "has 4000 tokens, fewer than 126 samples of 32: lower --samples"),
    ],
)
def test_impossible_sizes(tiny_llama: Path, text_file: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        batches(tiny_llama, text_file, **changes)


@pytest.mark.parametrize("name", ["wikitext3", "demo-audio", "data.csv"])
def test_unknown_set(tiny_llama: Path, name: str):
    with pytest.raises(UserError, match=f"no data set '{name}': use rp, c4, wikitext2, ptb, demo"):
        batches(tiny_llama, name)


def test_unreadable_files(tiny_llama: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"missing.txt cannot be read .no such file"):
        batches(tiny_llama, tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8"):
        batches(tiny_llama, tmp_path / "latin.txt")


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


# ---- fingerprint


def test_fingerprint_sees_values_names_types_shapes_and_order():
    base = [{"a": torch.arange(6), "b": torch.zeros(2)}]
    others = [
        [{"a": torch.arange(6), "b": torch.zeros(3)}],
        [{"a": torch.arange(6).reshape(2, 3), "b": torch.zeros(2)}],
        [{"a": torch.arange(6).int(), "b": torch.zeros(2)}],
        [{"a": torch.arange(6), "c": torch.zeros(2)}],
        [{"a": torch.arange(6)}, {"b": torch.zeros(2)}],
        [{"a": torch.arange(6), "b": torch.tensor([0.0, 1.0])}],
        [{"a": torch.arange(6), "b": torch.zeros(2, dtype=torch.bfloat16)}],
        *([Batch.of_chats(dict(base[0]), torch.tensor([first, True]))] for first in (False, True)),
    ]
    assert len({fingerprint(found) for found in [base, *others]}) == 10
    assert fingerprint([{"b": torch.zeros(2), "a": torch.arange(6)}]) == fingerprint(base)
