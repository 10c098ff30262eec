"""The stage: its checkpoint loads with transformers, low-rank factors, a byte budget, bad input."""

import json
import shutil

import pytest
import torch
from casp_quip_sharp.__main__ import label, main
from casp_quip_sharp.backend import QuipSharp
from casp_quip_sharp.linear import QuipSharpLinear
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import casp.finetune.in_block
import casp.finetune.teacher
import casp.model.capture
import casp.run.writer
from casp.budget import original_bytes
from casp.cli.quantizing import FineTuning
from casp.errors import UserError
from casp.model.checkpoint import resident_bytes, size
from casp.model.decoder import Decoder
from casp.moments import __main__ as moments
from casp.moments.find import COLLECTED, ON_THE_WAY


@pytest.fixture
def stage(texts):
    """Runs the stage in this process with small settings; further flags are appended."""

    def run(*flags):
        sizes = ["--samples", "4", "--sequence-length", "32", "--batch-size", "2", "--dataset", str(texts)]
        main([*sizes, "--device", "cpu", "--sweeps", "1", "--ft-epochs", "0", *map(str, flags)])

    return run


def logits(model):
    """Logits of a fixed text."""
    return model.eval()(torch.arange(4, 44).reshape(2, 20)).logits


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen3"])
def test_checkpoint_loads_and_saves_again(request, stage, tmp_path, name):
    source = request.getfixturevalue(name)
    out = tmp_path / "out"
    stage("--model", source, "--bits", 4, "--output", out, "--samples", 16)
    decoder = Decoder(source)
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
    decoder = Decoder(tiny_llava)
    expected = {f"{block}.{path}" for i, block in enumerate(decoder.blocks) for path in decoder.linears(i).values()}
    found = {name for name, module in model.named_modules() if isinstance(module, QuipSharpLinear)}
    assert found == expected
    assert len(found) == 21


def test_trellis(stage, tiny_llama, tmp_path):
    out = tmp_path / "out"
    stage("--model", tiny_llama, "--codebook", "trellis", "--bits", 4, "--output", out, "--samples", 16)
    format = QuipSharp().format(4, codebook="trellis")
    assert size(out).bytes == original_bytes(Decoder(tiny_llama), QuipSharp(), format)
    original, model = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tiny_llama, out))
    with torch.no_grad():
        before, after = logits(original), logits(model)
        assert (after - before).norm() < 0.4 * before.norm()
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)), after)


@pytest.mark.parametrize("name", ["quip-sharp-e8p-2bit", "quip-sharp-trellis-2bit", "quip-sharp-trellis-2bit-states10"])
def test_outputs_of_two_codebooks_have_two_names(name):
    codebook, states = ("e8p", 8) if "e8p" in name else ("trellis", 10 if "states10" in name else 8)
    assert label(QuipSharp().format(2, False, codebook, states), FineTuning()) == name


def test_low_rank_factors_and_freed_bytes(stage, low_rank, tiny_llama, tmp_path):
    out = tmp_path / "out"
    stage("--model", low_rank, "--bits", 2, "--output", out)
    limit = original_bytes(Decoder(tiny_llama), QuipSharp(), {"bits": 2})
    assert 0.9 * limit < size(out).bytes <= limit
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    linears = [module for module in model.modules() if isinstance(module, QuipSharpLinear)]
    assert {module.in_features for module in linears} >= {7, 12}
    assert {module.codebook.bits for module in linears} > {2}  # the freed bytes were spent
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--codebook", "e8p", "--bits", 5], "--bits 5"),
        (["--bits", 7], "--bits 7"),
        (["--damping", 0], "--damping 0"),
        (["--sweeps", -1], "--sweeps -1"),
        (["--bits-budget", 1.5], "budget"),
        (["--ft-epochs", -1], "--ft-epochs -1"),
        (["--e2e-lr", 0], "--e2e-lr 0"),
        (["--hessians", "/nowhere"], "not a finished folder"),
    ],
)
def test_bad_flags(stage, tiny_llama, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        stage("--model", tiny_llama, "--output", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def divergence(folder, original):
    """KL(original || folder) in nats a token on random characters, both run whole by transformers."""
    models = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (original, folder))
    ids = torch.randint(4, 98, (16, 32), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in models)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Random characters: what the tiny models, which were never trained, see every token of."""
    file = tmp_path_factory.mktemp("noise") / "noise.txt"
    codes = torch.randint(33, 127, (8000,), generator=torch.Generator().manual_seed(0))
    file.write_text("".join(map(chr, codes.tolist())))
    return file


TUNING = ["--samples", "64", "--block-lr", "1e-3", "--e2e-lr", "1e-3"]


def test_fine_tuning_brings_the_model_nearer(stage, low_rank, tiny_llama, noise, tmp_path):
    plain, block, both = (tmp_path / name for name in ("plain", "block", "both"))
    flags = ["--model", tiny_llama, *TUNING, "--dataset", noise]
    stage(*flags, "--output", plain)
    stage(*flags, "--output", block, "--block-epochs", 2)
    stage(*flags, "--output", both, "--ft-epochs", 2)
    found = [divergence(folder, tiny_llama) for folder in (plain, block, both)]
    assert found[0] > found[1] > found[2]
    report = json.loads((both / "casp_report.json").read_text())
    assert min(entry["validation"] for entry in report["end_to_end"]) < report["end_to_end"][0]["validation"]
    assert [sorted(part["after"]) for part in report["blocks"][0]["tuning"]] == [
        ["k", "q", "v"],
        ["o"],
        ["gate", "up"],
        ["down"],
    ]
    stage(*flags, "--model", low_rank, "--output", tmp_path / "low-rank", "--ft-epochs", 1)
    assert size(tmp_path / "low-rank").bytes <= size(both).bytes


def test_killed_while_fine_tuning_it_ends_with_the_same_bytes(stage, tiny_llama, tmp_path, monkeypatch):
    flags = ["--model", tiny_llama, "--ft-epochs", 2]
    stage(*flags, "--output", tmp_path / "whole")
    real = casp.finetune.in_block.save_state

    def dies(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(casp.finetune.in_block, "save_state", dies)
    for _ in range(2):  # once after each epoch
        with pytest.raises(KeyboardInterrupt):
            stage(*flags, "--output", tmp_path / "out")
    monkeypatch.undo()
    stage(*flags, "--output", tmp_path / "out")
    files = [
        {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".safetensors", ".json")}
        for folder in (tmp_path / "whole", tmp_path / "out")
    ]
    assert files[0] == files[1]


def test_inputs_of_teacher_and_student_are_captured_once(stage, tiny_llama, tmp_path, monkeypatch):
    captures, real = [], casp.model.capture.capture_inputs

    def counting(*args, **settings):
        captures.append(1)
        return real(*args, **settings)

    for module in (casp.run.writer, casp.finetune.teacher):
        monkeypatch.setattr(module, "capture_inputs", counting)
    flags = ["--ft-epochs", 0, "--block-epochs", 1]
    stage("--model", tiny_llama, *flags, "--output", tmp_path / "shared")
    assert len(captures) == 1

    def alone(self, batches, device, dtype, captured, walk=casp.run.writer.RunFolder.walk):
        return walk(self, batches, device, dtype)

    monkeypatch.setattr(casp.run.writer.RunFolder, "walk", alone)
    stage("--model", tiny_llama, *flags, "--output", tmp_path / "apart")
    assert len(captures) == 3
    shards = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("shared", "apart")]
    assert [file.read_bytes() for file in shards[0]] == [file.read_bytes() for file in shards[1]]


def test_moments_collected_before(stage, texts, tiny_llama, tiny_qwen2, tmp_path):
    folder = tmp_path / "moments"
    collect = ["--samples", "4", "--sequence-length", "32", "--dataset", str(texts), "--device", "cpu"]
    moments.main(["--model", str(tiny_llama), *collect, "--output", str(folder)])
    given = ["--model", tiny_llama, "--moments", folder, "--output", tmp_path / "given", "--token-weights", "attention"]
    stage(*given)
    stage(*given, "--samples", 8)  # no data is read, so these flags make no other run
    stage("--model", tiny_llama, "--hessians", folder, "--output", tmp_path / "tuned", "--ft-epochs", 1)
    stage("--model", tiny_llama, "--no-true-sequential", "--output", tmp_path / "collected")
    given, collected, tuned = (
        json.loads((tmp_path / name / "casp_report.json").read_text()) for name in ("given", "collected", "tuned")
    )
    assert tuned["settings"]["token_weights"] == COLLECTED
    # The first block sees the same inputs either way.
    given, collected = given["blocks"][0]["linears"], collected["blocks"][0]["linears"]
    assert given.keys() == collected.keys()
    for role, entry in given.items():
        assert entry["relative_error"] == pytest.approx(collected[role]["relative_error"], rel=0.05)
    with pytest.raises(UserError, match="another model"):
        stage("--model", tiny_qwen2, "--moments", folder, "--output", tmp_path / "out")


def test_moments_are_found_where_they_are_filed(stage, texts, tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    collect = ["--samples", "4", "--sequence-length", "32", "--dataset", str(texts), "--device", "cpu"]
    moments.main(["--model", str(tiny_llama), *collect])
    folder = f"runs/{tiny_llama.name}/moments"
    told = {}
    for name, flags in {
        "found": [],
        "others": ["--samples", 3],
        "none": ["--moments", "none"],
        "norm": ["--token-weights", "none+gradient"],
    }.items():
        capsys.readouterr()
        stage("--model", tiny_llama, "--output", name, *flags)
        settings = json.loads((tmp_path / name / "casp_report.json").read_text())["settings"]
        told[name] = capsys.readouterr().out, "moments" in settings, settings["token_weights"]
    assert f"using {folder}, moments collected before" in told["found"][0]
    assert f"not using {folder}, collected with --samples 4" in told["others"][0]
    assert folder not in told["none"][0]
    assert [entry[1:] for entry in told.values()] == [
        (True, COLLECTED),
        (False, ON_THE_WAY),
        (False, ON_THE_WAY),
        (True, "none+gradient"),
    ]
    with pytest.raises(UserError, match=r"gradient-norm needs moments.*hessian_offline"):
        stage("--model", tiny_llama, "--output", "out", "--token-weights", "gradient-norm")


def test_moments_of_data_that_changed_since_are_passed_over(stage, texts, tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine = shutil.copy(texts, tmp_path / f"mine{texts.suffix}")
    flags = ["--samples", "4", "--sequence-length", "32", "--dataset", str(mine), "--device", "cpu"]
    moments.main(["--model", str(tiny_llama), *flags])
    with open(mine, "a") as file:
        file.write(mine.read_text()[:400])
    capsys.readouterr()
    stage("--model", tiny_llama, "--output", "out", "--dataset", mine)
    said = capsys.readouterr().out
    assert f"not using runs/{tiny_llama.name}/moments, collected before {mine} changed" in said


@pytest.mark.parametrize("codebook", ["e8p", "trellis"])
def test_constant_calibration_text(stage, tiny_llama, tmp_path, codebook):
    """All tokens alike: every moment has rank 1, and rotating it leaves entries of its diagonal below 0."""
    text = tmp_path / "constant.txt"
    text.write_text("a" * 4000)
    tuned = ["--ft-epochs", 1, "--bits", 2, "--codebook", codebook]
    stage("--model", tiny_llama, "--output", tmp_path / "out", *tuned, "--dataset", text)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.isfinite(logits(model)).all()
