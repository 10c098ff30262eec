"""The whole stage on the tiny models: what it writes, how it resumes, what it refuses."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from casp_svd.__main__ import main
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import casp.run.writer
from casp.data import calibration_batches
from casp.errors import UserError
from casp.linear import LowRankLinear
from casp.lowrank import rank_for
from casp.model.checkpoint import size
from casp.model.decoder import Decoder
from casp.moments import __main__ as moments
from casp.moments.store import Moments
from casp.run.folder import LOG_FILE
from casp.run.writer import RunFolder

ROOT = Path(__file__).parents[2]
MODELS = ["tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_llava"]
KINDS = ["weight", "bias"]
COMMON = ["--samples", "16", "--sequence-length", "48", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> dict[str, Path]:
    """A text of random letters and a set of questions about pictures of noise."""
    folder = tmp_path_factory.mktemp("calibration")
    text = folder / "text.txt"
    letters = torch.randint(33, 127, (20_000,), generator=torch.Generator().manual_seed(0))
    text.write_text("".join(map(chr, letters)))
    rows = []
    for i in range(16):
        noise = torch.randint(0, 256, (50, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": f"which {'number'[i % 6 :]} is this?", "answer": str(i)})
    questions = folder / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {"text": text, "images": questions}


def flags(folder: Path, output: Path, calibration: dict[str, Path]) -> list[str]:
    dataset = calibration["images" if "llava" in folder.name else "text"]
    return ["--model", str(folder), "--output", str(output), "--dataset", str(dataset), *COMMON]


def load(folder: Path) -> torch.nn.Module:
    factory = AutoModelForImageTextToText if "llava" in folder.name else AutoModelForCausalLM
    return factory.from_pretrained(folder).eval()


def block_linears(model: torch.nn.Module, decoder: Decoder, leaf: str) -> list[torch.nn.Module]:
    return [model.get_submodule(f"{block}.self_attn.{leaf}_proj") for block in decoder.blocks]


@pytest.mark.parametrize("whitening", ["none", "input", "attention"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_loads_with_factors_and_biases(name, whitening, request, tmp_path, calibration):
    source = request.getfixturevalue(name)
    output = tmp_path / source.name
    main([*flags(source, output, calibration), "--whitening", whitening])
    decoder, original, model = Decoder(source), load(source), load(output)
    report = json.loads((output / "casp_report.json").read_text())
    assert report["settings"]["whitening"] == whitening
    assert len(report["blocks"]) == 3
    for leaf in "qk":
        before, after = block_linears(original, decoder, leaf), block_linears(model, decoder, leaf)
        for old, new, block in zip(before, after, report["blocks"], strict=True):
            rank = rank_for(0.25, old.out_features, old.in_features)
            assert isinstance(new, LowRankLinear)
            assert (new.rank, new.up.weight.dtype) == (rank, old.weight.dtype)
            assert (new.bias is None) == (old.bias is None)
            if old.bias is not None:
                assert torch.equal(new.bias, old.bias)
            entry = block["linears"][leaf]
            assert entry["rank"] == rank
            assert entry["bits"] <= 32 * 0.25
            assert 0 < entry["relative_error"] < 1
            if whitening == "none":
                lost = (old.weight - new.weight).square().sum() / old.weight.square().sum()
                assert entry["relative_error"] == pytest.approx(lost.item(), rel=1e-3)
    factored = {f"{block}.self_attn.{leaf}_proj.{kind}" for block in decoder.blocks for leaf in "qk" for kind in KINDS}
    for parameter, value in original.named_parameters():
        if parameter not in factored:
            assert torch.equal(value, model.get_parameter(parameter)), parameter
    for block in report["blocks"]:
        assert block["block_influence"] > 0
        assert 0 < block["attention_density"]["text"] <= 1
        assert (block["attention_density"]["image"] is None) == ("llava" not in name)


def attention_output(folder: Path, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """What the first block's attention puts out."""
    model, seen = load(folder), []
    module = model.get_submodule(Decoder(folder).blocks[0] + ".self_attn.o_proj")
    module.register_forward_hook(lambda module, args, out: seen.append(out[batch["attention_mask"].bool()]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return torch.cat(seen).double()


@pytest.mark.parametrize("name", MODELS)
def test_attention_whitening_beats_input_whitening(name, request, tmp_path, calibration):
    """In what it is for, the change of the attention's output; with query/key norms, biases and image tokens."""
    source = request.getfixturevalue(name)
    dataset = str(calibration["images" if "llava" in name else "text"])
    unseen = calibration_batches(source, dataset, 16, 48, 1, 4)
    before, lost = attention_output(source, unseen), {}
    for whitening in ("input", "attention"):
        output = tmp_path / whitening / source.name
        main([*flags(source, output, calibration), "--whitening", whitening, "--keep-ratio", "0.7"])
        lost[whitening] = (attention_output(output, unseen) - before).square().sum().item()
    assert lost["attention"] < lost["input"]


def test_keeps_the_dtype_of_the_model(tiny_llama, tmp_path, calibration):
    source = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((tiny_llama / name).read_bytes())
    output = tmp_path / "out"
    main(flags(source, output, calibration))
    stored = {k: v for file in output.glob("*.safetensors") for k, v in load_file(file).items()}
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert size(output).bpw < size(source).bpw == 16


def test_a_ratio_that_saves_nothing_leaves_the_layer_dense(tiny_llama, tmp_path, calibration):
    output = tmp_path / "out"
    main([*flags(tiny_llama, output, calibration), "--keep-ratio", "1"])
    before, after = load(tiny_llama), load(output)
    decoder = Decoder(tiny_llama)
    # 64 x 64 at rank 32 costs as much as dense; 32 x 64 would at rank 21 keep 98%.
    for old, new in zip(block_linears(before, decoder, "q"), block_linears(after, decoder, "q"), strict=True):
        assert torch.equal(old.weight, new.weight)
    assert all(new.rank == 21 for new in block_linears(after, decoder, "k"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != LOG_FILE}


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_resumes_with_the_same_bytes(stop_after, tiny_llama, tmp_path, calibration, monkeypatch):
    whole = tmp_path / "whole"
    main(flags(tiny_llama, whole, calibration))
    broken = tmp_path / "broken"
    save = RunFolder.save

    def interrupt(self, visit, report):
        if visit.index == stop_after:
            raise KeyboardInterrupt
        save(self, visit, report)

    monkeypatch.setattr(RunFolder, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(flags(tiny_llama, broken, calibration))
    assert not broken.exists()
    monkeypatch.undo()
    main(flags(tiny_llama, broken, calibration))
    assert contents(broken) == contents(whole)
    monkeypatch.setattr(casp.run.writer.RunFolder, "walk", None)  # nothing is left to do
    main(flags(tiny_llama, broken, calibration))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--keep-ratio", "0"], "keep-ratio"),
        (["--keep-ratio", "1.2"], "keep-ratio"),
        (["--damping", "-1"], "damping"),
        (["--damping", "nan"], "damping"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(extra, message, tiny_llama, tmp_path, calibration):
    output = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        main([*flags(tiny_llama, output, calibration), *extra])
    assert list(tmp_path.iterdir()) == []


def test_a_compressed_checkpoint_is_refused(tiny_llama, tmp_path, calibration):
    once = tmp_path / "once"
    main(flags(tiny_llama, once, calibration))
    with pytest.raises(UserError, match=r"self_attn\.q_proj is compressed already"):
        main(flags(once, tmp_path / "twice", calibration))


def test_fused_projections_are_factored_part_by_part(tmp_path, calibration, tiny_llama):
    from transformers import Phi3Config, Phi3ForCausalLM

    source = tmp_path / "phi"
    config = Phi3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
    )
    Phi3ForCausalLM(config).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((tiny_llama / name).read_bytes())
    main(flags(source, tmp_path / "out", calibration))
    fused = load_file(source / "model.safetensors")["model.layers.0.self_attn.qkv_proj.weight"]
    parts = Decoder(tmp_path / "out").load_block(0, torch.device("cpu"), torch.float32).self_attn.qkv_proj
    for low_rank in (parts.q, parts.k):
        assert isinstance(low_rank, LowRankLinear)
        assert low_rank.down.out_features == rank_for(0.25, 64, 64)
    assert torch.equal(parts.v.weight, fused[128:])  # 64 rows each of queries, keys and values


@pytest.mark.parametrize(("script", "model"), [("svd_llama.sh", "tiny_llama"), ("svd_llava.sh", "tiny_llava")])
def test_scripts_run_as_typed(script, model, request, tmp_path, calibration):
    source = request.getfixturevalue(model)
    output = tmp_path / source.name
    command = ["bash", str(ROOT / "SVD" / "scripts" / script), *flags(source, output, calibration)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "casp_report.json").read_text())["settings"]["keep_ratio"] == 0.25


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llava"])
def test_whitening_by_moments_collected_before(name, request, tmp_path, calibration):
    """By the loss's gradient, and by inputs as they are in the original model: no data is read then."""
    source = request.getfixturevalue(name)
    collected = tmp_path / "moments"
    moments.main(flags(source, collected, calibration))
    losses = {}
    dataset = str(calibration["images" if "llava" in name else "text"])
    unseen = calibration_batches(source, dataset, 16, 48, 1, 4)
    text = torch.cat([(batch["input_ids"] >= 4).flatten() for batch in unseen])

    def predictions(folder: Path) -> torch.Tensor:
        model = load(folder)
        logits = [model(**batch).logits.double().log_softmax(-1).flatten(0, 1) for batch in unseen]
        return torch.cat(logits)[text]

    with torch.no_grad():
        before = predictions(source)
        for whitening in ("none", "input", "gradient"):
            output = tmp_path / whitening / source.name
            asked = ["--whitening", whitening, "--keep-ratio", "0.6", "--moments", str(collected)]
            main([*flags(source, output, calibration), *asked])
            after = predictions(output)
            losses[whitening] = (before.exp() * (before - after)).sum(-1).mean().item()
            report = json.loads((output / "casp_report.json").read_text())
            known = Moments(collected).read(1)
            assert report["blocks"][1]["block_influence"] == known.influence
            assert report["blocks"][1]["attention_density"] == known.density
    assert losses["gradient"] < losses["none"]


def test_whitening_by_gradient_needs_moments(tiny_llama, tmp_path, calibration):
    with pytest.raises(UserError, match="hessian_offline"):
        main([*flags(tiny_llama, tmp_path / "out", calibration), "--whitening", "gradient"])


def test_what_was_warned_of_stands_in_the_report(tiny_llama, tmp_path, calibration):
    """One token a sample and no damping: the moment of the inputs has no factor without more of it."""
    few = ["--whitening", "input", "--damping", "0", "--samples", "1", "--sequence-length", "4"]
    main([*flags(tiny_llama, tmp_path / "out", calibration), *few])
    blocks = json.loads((tmp_path / "out" / "casp_report.json").read_text())["blocks"]
    notes = [note for block in blocks for role in "qk" for note in block["linears"][role]["notes"]]
    assert len(notes) >= 6
    assert all("no Cholesky factor" in note for note in notes)
