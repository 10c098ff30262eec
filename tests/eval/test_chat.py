"""Chat in the shell, as a user would run it."""

import io
import json
import shutil

import pytest
import torch
from casp_eval.chat import main
from casp_eval.loading import open_checkpoint
from casp_eval.questions import answers
from PIL import Image
from safetensors.torch import load_file, save_file

from casp.data.sources import evaluation_chats

SHORT = ["--max-new-tokens", "4", "--device", "cpu", "--dtype", "float32"]


def test_answers_lines_until_the_end(run_script, tiny_llava, pictures):
    image = pictures.parent / "0.png"
    done = run_script(
        *("chat.sh", "--model", tiny_llava, "--image", image, "--max-new-tokens", 5, "--dtype", "float32"),
        stdin="What is this?\n\nWhat is this?\n",
    )
    assert done.returncode == 0, done.stderr
    checkpoint = open_checkpoint(str(tiny_llava), "cpu", "float32")
    item = evaluation_chats(str(pictures), 0, 0)[0]
    expected = answers(checkpoint, [item], 1, 5)[0].lstrip()
    assert done.stdout == f"{expected}\n" * 2
    assert done.stderr.count("tokens/s") == 2


def test_one_question_of_a_text_model(tiny_llama, capfd):
    main(["--model", str(tiny_llama), "--question", "Hello", "--max-new-tokens", "4", "--device", "cpu"])
    out, err = capfd.readouterr()
    assert out.strip()
    assert "tokens/s" in err


def test_a_multimodal_model_without_an_image(tiny_llava, capsys):
    main(["--model", str(tiny_llava), "--question", "Hello", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.strip()


def test_a_video_is_asked_about_as_questions_sh_asks(video_model, tmp_path, capsys):
    clip = tmp_path / "clip"
    clip.mkdir()
    for number in range(6):
        Image.new("RGB", (64, 48), (number * 40,) * 3).save(clip / f"{number}.png")
    main(["--model", str(video_model), "--video", str(clip), "--frames", "4", "--question", "What?", *SHORT])
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"video": "clip", "question": "What?", "answer": "grey"}))
    checkpoint = open_checkpoint(str(video_model), "cpu", "float32")
    expected = answers(checkpoint, evaluation_chats(str(file), 0, 0, 4), 1, 4)[0]
    assert capsys.readouterr().out.strip() == expected.strip()


def test_a_video_that_does_not_open(refused, tiny_llava, tmp_path):
    assert "missing.mp4" in refused(main, "--model", tiny_llava, "--video", tmp_path / "missing.mp4")


@pytest.mark.parametrize("content", [None, b"", b"no picture at all", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_an_image_that_does_not_open(refused, tiny_llava, tmp_path, content):
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    assert f"the image {path} " in refused(main, "--model", tiny_llava, "--image", path)


def test_an_image_for_a_text_model(refused, tiny_llama, pictures):
    image = pictures.parent / "0.png"
    assert "text-only model (llama)" in refused(main, "--model", tiny_llama, "--image", image)


def test_an_unknown_model_through_the_shell(run_script):
    done = run_script("chat.sh", "--model", "/nowhere/model", "--question", "Hello")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_model_whose_logits_are_not_finite_does_not_seem_to_have_nothing_to_say(refused, tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "overflowing")
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], 3e38)
            save_file(tensors, shard, {"format": "pt"})
    said = refused(main, "--model", folder, "--question", "Hello", *SHORT)
    assert "gives NaN or infinity as logits" in said


@pytest.mark.parametrize(("typed", "said"), [("a" * 10**5 + "\n", "longer than 20000 characters")])
def test_a_question_that_no_model_reads(run_script, tiny_llama, typed, said):
    done = run_script("chat.sh", "--model", tiny_llama, stdin=typed)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_no_text(refused, tiny_llama, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), "utf-8"))
    assert "no text in UTF-8" in refused(main, "--model", tiny_llama)
