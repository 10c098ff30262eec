"""Text perplexity: windows, closed forms, agreement with transformers' own loss."""

import json
import math

import pytest
import torch
from casp_eval import scoring
from casp_eval.loading import open_checkpoint
from casp_eval.perplexity import main, mean_loss, perplexity, text_perplexity, text_windows
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from casp.errors import UserError

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TEXT = "the quick brown fox jumps over the lazy dog. " * 12


def token_rows(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.lm_head.weight.data.zero_()
    assert math.exp(mean_loss(model, token_rows(3, 20), 2)) == pytest.approx(128, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_agrees_with_the_loss_of_transformers(batch_size):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.lm_head.weight.data.mul_(20)
    rows = token_rows(5, 33)
    with torch.inference_mode():
        theirs = sum(model(input_ids=row[None], labels=row[None]).loss.item() for row in rows) / len(rows)
    assert mean_loss(model, rows, batch_size) == pytest.approx(theirs, rel=1e-6)


def test_a_model_that_caps_its_logits_is_scored_with_the_cap():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)).eval()
    model.get_output_embeddings().weight.data.mul_(50)
    rows = token_rows(2, 17)
    with torch.inference_mode():
        theirs = model(input_ids=rows, labels=rows).loss.item()
        model.config.final_logit_softcapping = None
        assert model(input_ids=rows, labels=rows).loss.item() != pytest.approx(theirs, rel=0.05)
        model.config.final_logit_softcapping = 2.0
    assert mean_loss(model, rows, 2) == pytest.approx(theirs, rel=1e-6)


def test_logits_of_a_whole_batch_never_exist(monkeypatch):
    monkeypatch.setattr(scoring, "ROWS", 7)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    sizes = []
    model.lm_head.register_forward_hook(lambda _, __, output: sizes.append(output.numel() // 128))
    mean_loss(model, token_rows(4, 16), 4)
    assert max(sizes) == 7
    assert sum(sizes) == 4 * 15 + 2  # every scored position once, and one twice to learn how the model uses its head


def test_only_kept_positions_are_scored():
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    rows = token_rows(2, 9)
    keep = torch.zeros_like(rows, dtype=torch.bool)
    keep[0, 3] = keep[1, 0] = True
    losses = scoring.token_losses(model, {"input_ids": rows}, rows.roll(-1, 1), keep)
    with torch.inference_mode():
        log_probabilities = model(input_ids=rows).logits.log_softmax(-1)
    expected = [-log_probabilities[0, 3, rows[0, 4]].item(), -log_probabilities[1, 0, rows[1, 1]].item()]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_windows_do_not_overlap_and_carry_no_bos(tiny_llama):
    tokenizer = open_checkpoint(str(tiny_llama), "cpu", "auto").tokenizer
    windows = text_windows(tokenizer, "abcdefgh ijk", 5, 0)
    assert [tokenizer.decode(row) for row in windows] == ["abcde", "fgh i"]
    assert text_windows(tokenizer, "abcdefgh ijk", 5, 1).shape == (1, 5)
    assert text_windows(tokenizer, "abcdefgh ijk", 5, 9).shape == (2, 5)
    with pytest.raises(UserError, match="12 tokens, too few for one window of 13"):
        text_windows(tokenizer, "abcdefgh ijk", 13, 0)


def test_text_perplexity_of_a_checkpoint(tiny_llama):
    checkpoint = open_checkpoint(str(tiny_llama), "cpu", "float32")
    figure = text_perplexity(checkpoint, TEXT, 32, 4, 3)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    rows = text_windows(checkpoint.tokenizer, TEXT, 32, 4)
    with torch.inference_mode():
        loss = model(input_ids=rows, labels=rows).loss.item()
    assert figure == {
        "perplexity": pytest.approx(math.exp(loss), rel=1e-5),
        "windows": 4,
        "sequence_length": 32,
        "tokens": 4 * 31,
    }


def test_perplexity_of_damage():
    with pytest.raises(UserError, match="some-model predicts NaN"):
        perplexity(math.nan, "some-model")
    assert perplexity(5000.0, "some-model") < math.inf


def test_a_damaged_checkpoint_is_refused(tiny_llama, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match="is truncated"):
        open_checkpoint(str(folder), "cpu", "auto")


def test_a_checkpoint_with_a_tensor_missing_is_refused(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"lacks model.layers.1.mlp.up_proj.weight that its config asks for"):
        open_checkpoint(str(tmp_path), "cpu", "auto")


def test_a_checkpoint_without_tokenizer_is_refused(tiny_llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        open_checkpoint(str(tmp_path), "cpu", "auto")


def test_script_with_every_option(run_script, tiny_llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    output = tmp_path / "deep" / "figure.json"
    done = run_script(
        *("perplexity.sh", "--model", tiny_llama, "--dataset", text, "--windows", 3, "--sequence-length", 16),
        *("--batch-size", 2, "--device", "cpu", "--dtype", "bfloat16", "--output", output),
    )
    assert done.returncode == 0, done.stderr
    figure = json.loads(output.read_text())
    assert (figure["windows"], figure["sequence_length"], figure["dataset"]) == (3, 16, str(text))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--dataset": "nothing"}, "unknown text 'nothing'"),
        ({"--dataset": "missing.txt"}, "missing.txt cannot be read"),
        ({"--model": "no/such-folder/anywhere"}, "does not exist"),
        ({"--sequence-length": "1"}, "1 is not at least 2"),
        ({"--windows": "many"}, "invalid whole number value: 'many'"),
        ({"--sequence-length": "1000000"}, "too few for one window"),
        ({"--sequence-length": "100000000"}, "100000000 is not at most"),
        ({"--device": "abacus"}, "abacus is unknown"),
        ({"--dataset": "wikitext2"}, "cannot be fetched from the hub"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(refused, tiny_llama, changes, message):
    options = {"--model": str(tiny_llama), "--dataset": "test", **changes}
    assert message in refused(main, *[word for pair in options.items() for word in pair])


def test_an_input_is_no_output(refused, tiny_llama, tmp_path):
    text = tmp_path / "text.json.txt"
    text.write_text("some text " * 50)
    before = {file: file.read_bytes() for file in [text, *tiny_llama.iterdir()]}
    for place in (tiny_llama / "config.json", tiny_llama / "figures.json", text):
        assert "input" in refused(main, "--model", tiny_llama, "--dataset", text, "--output", place)
    (tmp_path / "thesis.json").write_text("{}")
    assert "no figures" in refused(main, "--model", tiny_llama, "--output", tmp_path / "thesis.json")
    assert {file: file.read_bytes() for file in [text, *tiny_llama.iterdir()]} == before
