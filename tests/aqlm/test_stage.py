"""The stage: flags, plan, checkpoints, fine-tuning; its plain export in the hands of the real package."""

import json
import os
import subprocess
import sys

import pytest
import torch
from casp_aqlm.__main__ import main
from casp_aqlm.backend import AQLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from casp.budget import original_bytes
from casp.errors import UserError
from casp.model.checkpoint import size
from casp.model.decoder import Decoder

LOAD = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokens = torch.arange(4, 36)[None]
with torch.no_grad():
    found = {name: model(tokens).logits for name in ("first", "second")}
assert "casp" not in sys.modules
assert any(type(module).__module__.startswith("aqlm") for module in model.modules())
save_file(found, output)
"""


@pytest.fixture(scope="module")
def stage(texts):
    """Runs the stage in this process with small settings; further flags are appended."""

    def run(*flags):
        sizes = ["--samples", "4", "--sequence-length", "32", "--batch-size", "2", "--dataset", str(texts)]
        small = ["--scheme", "2x4g8", "--max-rounds", "2", "--ft-epochs", "0", "--device", "cpu"]
        main([*sizes, *small, *map(str, flags)])

    return run


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(4, 36)[None]).logits


def test_bytes_are_those_planned_and_two_runs_end_with_the_same(stage, tiny_llama, tmp_path):
    for name in ("a", "b"):
        stage("--model", tiny_llama, "--output", tmp_path / name)
    for shard in (tmp_path / "a").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "b" / shard.name).read_bytes()
    decoder, backend = Decoder(tiny_llama), AQLM()
    assert size(tmp_path / "a").bytes == original_bytes(decoder, backend, backend.format("2x4g8"))
    assert torch.isfinite(logits(tmp_path / "a")).all()


def test_more_codebooks_change_less(stage, tiny_llama, tmp_path):
    before, errors = logits(tiny_llama), []
    for scheme in ("2x4g8", "4x6g4"):
        stage("--model", tiny_llama, "--output", tmp_path / scheme, "--scheme", scheme)
        errors.append((logits(tmp_path / scheme) - before).norm() / before.norm())
    assert errors[1] < 0.3 * errors[0]


def test_low_rank_layers_pay_for_more_codebooks_at_the_same_bytes(stage, tiny_llama, low_rank, tmp_path):
    flags = ["--scheme", "1x4g8", "--entries", "float8", "--bits-budget", "6"]
    stage("--model", low_rank, "--output", tmp_path / "casp", *flags)
    assert size(tmp_path / "casp").bpw <= 6
    config = json.loads((tmp_path / "casp" / "config.json").read_text())["quantization_config"]
    assert any(path.endswith("q_proj.down") for path in config["modules"])
    assert torch.isfinite(logits(tmp_path / "casp")).all()


@pytest.mark.parametrize("entries", ["float16", "int8"])
def test_fine_tuning_moves_codebooks_and_scales_and_lowers_the_loss(stage, tiny_llama, tmp_path, entries):
    for name, epochs in (("plain", 0), ("tuned", 2)):
        how = ["--block-epochs", epochs, "--e2e-epochs", epochs, "--entries", entries]
        how += ["--block-lr", "0.02", "--e2e-lr", "0.02"] if entries == "int8" else []  # beyond half a whole number
        stage("--model", tiny_llama, "--output", tmp_path / name, *how)
    shards = [(tmp_path / name).glob("*.safetensors") for name in ("plain", "tuned")]
    found = [{key: tensor for shard in part for key, tensor in load_file(shard).items()} for part in shards]
    for name in ("codebooks", "scales"):
        paths = [path for path in found[0] if path.endswith(name)]
        assert any(not torch.equal(found[0][path], found[1][path]) for path in paths)
    curve = json.loads((tmp_path / "tuned" / "casp_report.json").read_text())["end_to_end"]
    assert min(entry["validation"] for entry in curve) <= curve[0]["validation"]
    assert size(tmp_path / "plain").bytes == size(tmp_path / "tuned").bytes


@pytest.mark.parametrize(("scheme", "entries"), [("2x8g8", "float16"), ("2x8g8", "int8"), ("1x10g4", "float16")])
def test_stock_transformers_and_aqlm_compute_our_logits(stage, tiny_llama, tmp_path, scheme, entries):
    output, theirs = tmp_path / "out", tmp_path / "theirs.safetensors"
    for _ in range(2):  # the same export again is left as it is
        stage("--model", tiny_llama, "--output", output, "--scheme", scheme, "--entries", entries, "--export", "aqlm")
    command = [sys.executable, "-c", LOAD, f"{output}-aqlm", str(theirs)]
    one = os.environ | {"NUMBA_NUM_THREADS": "1"}  # the package's kernel adds to shared sums: more threads spoil them
    done = subprocess.run(command, env=one, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for found in load_file(theirs).values():
        torch.testing.assert_close(found, logits(output), rtol=1e-4, atol=1e-4)


def test_what_a_plain_checkpoint_cannot_hold_is_refused_before_any_work(stage, tiny_llama, low_rank, tmp_path):
    with pytest.raises(UserError, match="low-rank"):
        stage("--model", low_rank, "--output", tmp_path / "a", "--export", "aqlm")
    with pytest.raises(UserError, match="groups of 7 do not divide"):
        stage("--model", tiny_llama, "--output", tmp_path / "b", "--export", "aqlm", "--scheme", "2x4g7")
    for other in (("--bits-budget", "9"), ("--plan", tmp_path / "plan.json")):
        with pytest.raises(UserError, match="one format for all layers"):
            stage("--model", tiny_llama, "--output", tmp_path / "c", "--export", "aqlm", *other)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--damping", "2", "--damping 2"),
        ("--tolerance", "-1", "--tolerance -1"),
        ("--max-rounds", "-3", "not at least 0"),
    ],
)
def test_numbers_out_of_range(stage, tiny_llama, tmp_path, flag, value, words):
    with pytest.raises(UserError, match=words):
        stage("--model", tiny_llama, "--output", tmp_path / "out", flag, value)
