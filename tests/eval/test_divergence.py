"""The divergence of a checkpoint from its original, against its definition computed by hand."""

import json
import shutil

import pytest
import torch
from casp_eval.divergence import main
from casp_eval.ranks_and_density import correlations
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from casp.cli import Calibration


@pytest.fixture
def changed(tmp_path):
    """A copy of a checkpoint with noise on all weights of its first shard."""

    def make(model):
        folder = tmp_path / "changed"
        shutil.copytree(model, folder)
        file = min(folder.glob("*.safetensors"))
        generator = torch.Generator().manual_seed(0)
        noisy = {
            name: tensor * (1 + 0.3 * torch.randn(tensor.shape, generator=generator))
            for name, tensor in load_file(file).items()
        }
        save_file(noisy, file, {"format": "pt"})
        return folder

    return make


def measured(model, original, tmp_path, *flags):
    output = tmp_path / "figure.json"
    words = [
        "--model",
        model,
        "--original",
        original,
        "--dtype",
        "float32",
        "--batch-size",
        2,
        "--output",
        output,
        *flags,
    ]
    main([str(word) for word in words])
    return json.loads(output.read_text())


def by_hand(kind, original, other, batches, hidden_ids):
    """One position at a time: sum p (ln p - ln q) where this token and the next are text."""
    total, count = 0.0, 0
    p, q = (kind.from_pretrained(folder, dtype=torch.float32).eval() for folder in (original, other))
    with torch.no_grad():
        for batch in batches:
            a, b = (torch.log_softmax(model(**batch).logits.double(), -1) for model in (p, q))
            for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
                for place in range(len(ids) - 1):
                    text = all(mask[i] and int(ids[i]) not in hidden_ids for i in (place, place + 1))
                    if text:
                        total += float((a[row, place].exp() * (a[row, place] - b[row, place])).sum())
                        count += 1
    return total / count, count


def test_of_text(tiny_llama, changed, tmp_path):
    other, text = changed(tiny_llama), tmp_path / "text.txt"
    text.write_text("a quick brown fox jumps over the lazy dog " * 60)
    figure = measured(other, tiny_llama, tmp_path, "--dataset", text, "--samples", 4, "--sequence-length", 24)
    batches = Calibration(str(text), 4, 24, 2).batches(tiny_llama, 1000)
    batches = [{"attention_mask": torch.ones_like(batch["input_ids"]), **batch} for batch in batches]
    expected, count = by_hand(AutoModelForCausalLM, tiny_llama, other, batches, set())
    assert figure["divergence"] == pytest.approx(expected, rel=1e-4)
    assert figure["divergence"] > 1e-3
    assert figure["positions"] == count == 4 * 23


def test_of_pictures_counts_text_alone(tiny_llava, changed, pictures, tmp_path):
    other = changed(tiny_llava)
    figure = measured(other, tiny_llava, tmp_path, "--dataset", pictures, "--samples", 4)
    batches = Calibration(str(pictures), 4, 512, 2).batches(tiny_llava, 1000)
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    expected, count = by_hand(AutoModelForImageTextToText, tiny_llava, other, batches, {model.config.image_token_id})
    assert figure["divergence"] == pytest.approx(expected, rel=1e-4)
    assert figure["positions"] == count


def test_of_a_model_from_itself(tiny_llama, tmp_path):
    figure = measured(tiny_llama, tiny_llama, tmp_path, "--samples", 2, "--sequence-length", 16)
    assert figure["divergence"] == pytest.approx(0, abs=1e-7)


def test_a_model_of_other_tokens_is_no_original(refused, tiny_llama, tmp_path):
    """Of the same shape, and with as many tokens: nothing else would tell that the ids stand for other words."""
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, last = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    assert "has other tokens than" in refused(main, "--model", other, "--original", tiny_llama, "--samples", 2)


def test_ranks_that_follow_a_measure():
    found = correlations(
        {"rises": [0.1, 0.2, 0.4], "falls": [3.0, 2.0, 1.0], "unknown": [None, 1.0, 2.0]},
        {"q": [8, 9, 10], "k": [3, 2, 1]},
    )
    assert set(found) == {"rises", "falls"}
    assert (found["rises"]["q"]["spearman"], found["rises"]["k"]["spearman"]) == (1, -1)
    assert (found["falls"]["q"]["spearman"], found["falls"]["k"]["spearman"]) == (-1, 1)
