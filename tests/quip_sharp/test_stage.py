"""The stage: its checkpoint loads with transformers, low-rank factors, a byte budget, bad input."""

import pytest
import torch
from casp_quip_sharp.__main__ import main
from casp_quip_sharp.backend import QuipSharp
from casp_quip_sharp.linear import QuipSharpLinear
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from casp.budget import original_bytes
from casp.checkpoint import resident_bytes, size
from casp.errors import UserError
from casp.linear import LowRankLinear
from casp.models import Decoder
from casp.run import RunFolder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A calibration file: one token for each character in the tiny models."""
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("The quick brown fox jumps over the lazy dog, and sphinx of black quartz, judge my vow. " * 30)
    return file


@pytest.fixture
def stage(texts):
    """Runs the stage in this process with small settings; further flags are appended."""

    def run(*flags):
        sizes = ["--samples", "4", "--sequence-length", "32", "--batch-size", "2", "--dataset", str(texts)]
        main([*sizes, "--device", "cpu", "--sweeps", "1", *map(str, flags)])

    return run


@pytest.fixture(scope="module")
def low_rank(tiny_llama, tmp_path_factory):
    """The tiny Llama with W_q of rank 12 and W_k of rank 7 in every block: widths that are no multiples of 8."""
    folder = tmp_path_factory.mktemp("low-rank") / "model"
    run = RunFolder(folder, Decoder.open(tiny_llama), "svd", "tiny", {}, "none")
    for visit in run.walk([{"input_ids": torch.arange(4, 36).reshape(2, 16)}], torch.device("cpu"), torch.float32):
        for role, rank in (("q", 12), ("k", 7)):
            path = visit.linears[role]
            old = visit.block.get_submodule(path)
            new = LowRankLinear(old.in_features, old.out_features, rank, bias=False)
            u, s, vh = torch.linalg.svd(old.weight.detach(), full_matrices=False)
            new.down.weight.data = s[:rank, None].sqrt() * vh[:rank]
            new.up.weight.data = u[:, :rank] * s[:rank].sqrt()
            parent, _, leaf = path.rpartition(".")
            setattr(visit.block.get_submodule(parent), leaf, new.requires_grad_(False))
        run.save(visit, {})
    run.finish()
    return folder


def logits(model):
    """Logits of a fixed text."""
    return model.eval()(torch.arange(4, 44).reshape(2, 20)).logits


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen3"])
def test_checkpoint_loads_and_saves_again(request, stage, tmp_path, name):
    source = request.getfixturevalue(name)
    out = tmp_path / "out"
    stage("--model", source, "--bits", 4, "--output", out)
    decoder = Decoder.open(source)
    expected = original_bytes(decoder, QuipSharp(), {"bits": 4})
    assert size(out).bytes == expected
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    linears = [module for module in model.modules() if isinstance(module, QuipSharpLinear)]
    assert len(linears) == 21
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = 4 * decoder.original_weights()
    assert resident_bytes(model) == pytest.approx(resident_bytes(original) - weights + expected, abs=64)
    with torch.no_grad():
        before, after = logits(original), logits(model)
        assert torch.isfinite(after).all()
        assert (after - before).norm() < 0.4 * before.norm()
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
        assert torch.equal(logits(again), after)


def test_llava(stage, tiny_llava, tmp_path):
    stage("--model", tiny_llava, "--bits", 3, "--output", tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert sum(isinstance(module, QuipSharpLinear) for module in model.modules()) % 7 == 0


def test_low_rank_factors_and_freed_bytes(stage, low_rank, tiny_llama, tmp_path):
    out = tmp_path / "out"
    stage("--model", low_rank, "--bits", 2, "--output", out)
    limit = original_bytes(Decoder.open(tiny_llama), QuipSharp(), {"bits": 2})
    assert 0.9 * limit < size(out).bytes <= limit
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    linears = [module for module in model.modules() if isinstance(module, QuipSharpLinear)]
    assert {module.in_features for module in linears} >= {7, 12}
    assert {module.bits for module in linears} > {2}  # the freed bytes were spent
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", 5], "--bits 5"),
        (["--damping", 0], "--damping 0"),
        (["--sweeps", -1], "--sweeps -1"),
        (["--bits-budget", 1.5], "budget"),
    ],
)
def test_bad_flags(stage, tiny_llama, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        stage("--model", tiny_llama, "--output", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
