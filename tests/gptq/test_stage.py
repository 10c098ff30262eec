"""The stage: its flags, its plan, its two checkpoints, bad input."""

import json
import shutil

import pytest
import torch
from casp_gptq.__main__ import main
from casp_gptq.backend import GPTQ
from casp_gptq.export import common_format
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from casp.budget import original_bytes
from casp.errors import UserError
from casp.model.checkpoint import size
from casp.model.decoder import Decoder
from casp.moments import __main__ as moments
from casp.moments.find import COLLECTED


@pytest.fixture(scope="module")
def stage(texts):
    """Runs the stage in this process with small settings; further flags are appended."""

    def run(*flags):
        sizes = ["--samples", "4", "--sequence-length", "32", "--batch-size", "2", "--dataset", str(texts)]
        main([*sizes, "--group-size", "32", "--device", "cpu", *map(str, flags)])

    return run


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(4, 36)[None]).logits


def test_eight_bits_change_little_and_the_bytes_are_those_planned(stage, tiny_llama, tmp_path):
    output = tmp_path / "out"
    stage("--model", tiny_llama, "--bits", 8, "--output", output)
    before, after = logits(tiny_llama), logits(output)
    assert (after - before).norm() < 0.05 * before.norm()
    decoder, backend = Decoder(tiny_llama), GPTQ()
    assert size(output).bytes == original_bytes(decoder, backend, backend.format(8, 32))


def test_two_runs_end_with_the_same_bytes(stage, tiny_llama, tmp_path):
    for name in ("a", "b"):
        stage("--model", tiny_llama, "--bits", 3, "--output", tmp_path / name)
    for shard in (tmp_path / "a").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "b" / shard.name).read_bytes()
    stage("--model", tiny_llama, "--bits", 3, "--output", tmp_path / "a")  # finished already: nothing to do
    with pytest.raises(UserError, match="bits 3 -> 4"):
        stage("--model", tiny_llama, "--bits", 4, "--output", tmp_path / "a")


@pytest.fixture(scope="module")
def two_bits(stage, tiny_llama, tmp_path_factory):
    """The tiny Llama at 2 bits with default settings."""
    output = tmp_path_factory.mktemp("two-bits") / "out"
    stage("--model", tiny_llama, "--bits", 2, "--output", output)
    return output


@pytest.mark.parametrize(
    "flag", ["--symmetric", "--no-act-order", "--no-true-sequential", "--sweeps=0", "--clip-search=0"]
)
def test_each_switch_reaches_the_result(stage, tiny_llama, two_bits, tmp_path, flag):
    stage("--model", tiny_llama, "--bits", 2, "--output", tmp_path / "switched", flag)
    assert not torch.equal(logits(two_bits), logits(tmp_path / "switched"))


def test_low_rank_layers_pay_for_more_bits_at_the_same_bytes(stage, tiny_llama, low_rank, tmp_path):
    stage("--model", low_rank, "--bits", 2, "--output", tmp_path / "casp")
    decoder, backend = Decoder(tiny_llama), GPTQ()
    plain = original_bytes(decoder, backend, backend.format(2, 32))
    assert 0.9 * plain < size(tmp_path / "casp").bytes <= plain  # matrices of a tiny model are coarse coins
    config = json.loads((tmp_path / "casp" / "config.json").read_text())["quantization_config"]
    formats = {path: entry["format"]["bits"] for path, entry in config["modules"].items() if "format" in entry}
    assert set(formats.values()) > {2}
    assert any(path.endswith("q_proj.down") for path in formats)
    assert torch.isfinite(logits(tmp_path / "casp")).all()


def test_a_byte_budget_is_met_and_never_exceeded(stage, tiny_llama, tmp_path):
    stage("--model", tiny_llama, "--bits", 2, "--bits-budget", 4.2, "--output", tmp_path / "budget")
    result = size(tmp_path / "budget")
    assert 0.95 * 4.2 < result.bpw <= 4.2
    stage("--model", tiny_llama, "--bits", 2, "--target-bytes-of", tmp_path / "budget", "--output", tmp_path / "same")
    assert size(tmp_path / "same").bytes == result.bytes
    with pytest.raises(UserError, match="more than the budget"):
        stage("--model", tiny_llama, "--bits", 4, "--bits-budget", 2, "--output", tmp_path / "impossible")


def test_the_plain_export_holds_the_same_tensors(stage, tiny_llama, tmp_path):
    for _ in range(2):  # the second finds both finished
        stage("--model", tiny_llama, "--bits", 4, "--output", tmp_path / "out", "--export", "gptq")
    plain = tmp_path / "out-gptqmodel"
    config = json.loads((plain / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq"
    assert config["checkpoint_format"] == "gptq_v2"
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, False)
    index = json.loads((plain / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in (tmp_path / "out").glob("*.safetensors"):
        ours, theirs = load_file(shard), load_file(plain / shard.name)
        for name, tensor in ours.items():
            assert torch.equal(theirs[name], tensor)
        for name in theirs.keys() - ours.keys():
            assert name.endswith(".g_idx")
            assert torch.equal(theirs[name], (torch.arange(len(theirs[name])) // 32).int())
        assert all(index[name] == shard.name for name in theirs)


def test_what_a_plain_checkpoint_cannot_hold_is_said_before_any_work(stage, tiny_llama, low_rank, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(UserError, match="low-rank"):
        stage("--model", low_rank, "--output", output, "--export", "gptq")
    with pytest.raises(UserError, match="do not divide"):
        stage("--model", tiny_llama, "--output", output, "--export", "gptq", "--group-size", 64)
    with pytest.raises(UserError, match="groups of"):
        stage("--model", tiny_llama, "--output", output, "--export", "gptq", "--group-size", 48)
    for other in (("--bits-budget", 4), ("--plan", tmp_path / "plan.json")):
        with pytest.raises(UserError, match="one format"):
            stage("--model", tiny_llama, "--output", output, "--export", "gptq", *other)
    mixed = {"a": {"format": {"bits": 2, "group_size": 32}}, "b": {"format": {"bits": 3, "group_size": 32}}}
    with pytest.raises(UserError, match=r"one (bit width|format)"):
        common_format(mixed, {})
    with pytest.raises(UserError, match="multiples of 32"):
        common_format({"a": mixed["a"]}, {"a": (0, 40, 64)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "said"), [("out-gptqmodel", "holds other files"), ("out-gptqmodel.partial", r"holds thesis\.txt")]
)
def test_an_export_replaces_nothing_of_others_and_says_so_before_any_work(stage, tiny_llama, tmp_path, name, said):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("do not touch")
    with pytest.raises(UserError, match=said):
        stage("--model", tiny_llama, "--bits", 4, "--output", tmp_path / "out", "--export", "gptq")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [name, f"{name}/thesis.txt"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--bits", 5], "--bits"),
        (["--bits", 0], "--bits"),
        (["--group-size", 0], "--group-size"),
        (["--damping", 0], "--damping"),
        (["--sweeps", -1], "--sweeps"),
        (["--clip-search", -1], "--clip-search"),
    ],
)
def test_numbers_out_of_range(stage, tiny_llama, tmp_path, flags, named):
    with pytest.raises(UserError, match=named):
        stage("--model", tiny_llama, "--output", tmp_path / "out", *flags)
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_is_not_quantized_again(stage, two_bits, tmp_path):
    with pytest.raises(UserError, match="already quantized"):
        stage("--model", two_bits, "--bits", 4, "--output", tmp_path / "twice")


def test_a_weight_that_is_not_a_number_is_named_and_nothing_looks_finished(stage, tiny_llama, tmp_path):
    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    name = "model.layers.1.self_attn.v_proj.weight"
    for shard in broken.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            found = name in file.keys()  # noqa: SIM118 (safe_open is no mapping)
        if found:
            tensors = load_file(shard)
            tensors[name][3, 5] = float("nan")
            save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\."):
        stage("--model", broken, "--bits", 4, "--no-true-sequential", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_moments_collected_before(stage, texts, tiny_llama, tmp_path):
    collect = ["--samples", "4", "--sequence-length", "32", "--dataset", str(texts), "--device", "cpu"]
    moments.main(["--model", str(tiny_llama), *collect, "--output", str(tmp_path / "moments")])
    used = {}
    for name, flags in {
        "plain": [],
        "default": ["--moments", tmp_path / "moments"],
        "asked": ["--moments", tmp_path / "moments", "--token-weights", "gradient"],
    }.items():
        stage("--model", tiny_llama, "--output", tmp_path / name, *flags)
        used[name] = json.loads((tmp_path / name / "casp_report.json").read_text())["settings"]["token_weights"]
    assert used == {"plain": "none", "default": COLLECTED, "asked": "gradient"}
    assert not torch.equal(logits(tmp_path / "default"), logits(tmp_path / "asked"))
