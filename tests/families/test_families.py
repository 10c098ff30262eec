"""Every family through every stage, from a tiny random checkpoint; what is loaded equals what was compressed.

CASP_FAMILIES=FILE makes the tests write what they found there, a line of JSON a family; `table.py` makes
docs/families.md of it.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import casp_gptq.__main__ as gptq
import casp_quip_sharp.__main__ as quip_sharp
import casp_svd.__main__ as svd
from casp_aqlm.export import check_exportable as aqlm_exportable
from casp_gptq.export import check_exportable as gptq_exportable
from zoo import FAMILIES, Family

import casp.cli.options
import casp.moments.__main__ as moments_stage
from casp.errors import UserError
from casp.model.capture import capture_inputs
from casp.model.decoder import Decoder, _factory
from casp.model.split import Experts, SplitLinear
from casp.moments.collect import collect
from casp.moments.store import Moments
from casp.reading.config import open_config
from casp.run.folder import WorkFolder

CPU = torch.device("cpu")
VISUAL = [3, 4, 5, 6]  # a token of these, generated at random, would ask for a picture
OUTSIDE = {"llama4_text": "only .* of the decoder's weights in linears"}
"""Families that CASP does not compress -> what it says before anything is computed."""
NO_QUERIES = {"deepseek_v2"}
"""Families whose attention has no linears for queries and keys, which the SVD stage refuses."""


def parameters(names):
    every_day = [pytest.param(name) for name in names if FAMILIES[name].fast]
    return every_day + [pytest.param(name, marks=pytest.mark.slow) for name in names if not FAMILIES[name].fast]


def loaded(folder: Path) -> torch.nn.Module:
    return _factory(open_config(folder)).from_pretrained(folder, dtype=torch.float32).eval()


def require_equal(folder: Path, batch: dict[str, torch.Tensor]) -> None:
    """What `from_pretrained` makes of `folder` computes what the decoder view does, and generates with a cache."""
    model, decoder = loaded(folder), Decoder(folder)
    decoder.load_rest(CPU, torch.float32)
    for index in range(len(decoder.blocks)):
        decoder.load_block(index, CPU, torch.float32)
    if not decoder.shows_attention:  # one attention for both: packed products round their inputs to 14 bits or so,
        model.set_attn_implementation("eager")  # which makes of the last bit of two attentions one of those
    with torch.no_grad():
        found, expected = model(**batch).logits, decoder.model(**batch, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "suppress_tokens": VISUAL,
    }
    if "moe_mm_token_type_ids" in batch:  # transformers does not lengthen these without a cache
        assert model.generate(**batch, **options).shape[1] == batch["input_ids"].shape[1] + 4
        return
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


def require_dense(folder: Path, batch: dict[str, torch.Tensor], place: Path) -> None:
    """What `dequantize` makes of a compressed model is saved as transformers' own model of its kind."""
    dense = loaded(folder).dequantize()
    dense.save_pretrained(place)
    again, told = _factory(open_config(place)).from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    assert not any(told.values()), told
    assert not any(isinstance(one, Experts | SplitLinear) for one in again.modules())
    with torch.no_grad():
        found, expected = again.eval()(**batch).logits, dense(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", parameters(FAMILIES))
def test_every_stage(name, tmp_path, monkeypatch):
    family: Family = FAMILIES[name]
    model, batch = family.save(tmp_path / "model"), family.batch()
    found = {"family": name, "inputs": family.inputs}
    monkeypatch.setattr(casp.cli.options, "calibration_batches", lambda *args: [dict(batch), dict(batch)])
    monkeypatch.chdir(tmp_path)
    common = ["--batch-size", 2, "--samples", 4, "--sequence-length", 20]

    def run(stage, folder: Path, output: str, *flags: object) -> Path:
        stage.main([*map(str, ["--model", folder, "--output", output, *common, *flags])])
        return tmp_path / output

    if name in OUTSIDE:
        with pytest.raises(UserError, match=OUTSIDE[name]) as refusal:
            run(gptq, model, "refused", "--from-original")
        found |= {"refused": str(refusal.value).split(": ", 1)[1]}
        return tell(found)
    found["share"] = Decoder(model).share()
    start = model
    if name in NO_QUERIES:
        with pytest.raises(UserError, match="nothing to factor"):
            run(svd, model, "svd")
        found["svd"] = "no queries and keys of their own"
    else:
        start = run(svd, model, "svd", "--keep-ratio", 0.5)
        require_equal(start, batch)
        found["svd"] = "yes"
    moments = run(moments_stage, model, "moments", "--from-original")
    found["moments"] = "yes"
    known = ["--moments", moments, "--token-weights", "attention+gradient"]
    packed = run(gptq, model, "gptq", "--bits", 4, "--group-size", 16, "--from-original", *known)
    require_equal(packed, batch)
    require_dense(packed, batch, tmp_path / "dense")
    found["gptq"] = "yes"
    require_equal(run(quip_sharp, start, "quip", "--bits", 2, "--ft-epochs", 1, "--from-original"), batch)
    found["quip-sharp"] = "yes"
    tell(found)


def tell(found: dict[str, object]) -> None:
    if "CASP_FAMILIES" in os.environ:
        with open(os.environ["CASP_FAMILIES"], "a") as file:
            file.write(json.dumps(found) + "\n")


@pytest.mark.parametrize("name", parameters(set(FAMILIES) - set(OUTSIDE)))
def test_the_opened_model_is_the_saved_one(name, tmp_path):
    """Taking experts and fused projections apart changes nothing: logits equal those of transformers' own model."""
    family = FAMILIES[name]
    family.save(tmp_path)
    batch, decoder = family.batch(), Decoder(tmp_path)
    capture_inputs(decoder, [batch], CPU, torch.float32)  # compares blocks with the model's own forward
    decoder.load_rest(CPU, torch.float32)
    for index in range(len(decoder.blocks)):
        decoder.load_block(index, CPU, torch.float32)
    own = loaded(tmp_path)
    own.set_attn_implementation("eager")
    with torch.no_grad():
        found, expected = decoder.model(**batch, use_cache=False).logits, own(**batch, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_what_cross_attention_reads_has_gradients_too(tmp_path):
    """Keys and values of a picture's own states, whose damage would else be priced at nothing."""
    family = FAMILIES["mllama"]
    torch.manual_seed(0)
    model = family.make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
            elif name.endswith("_gate"):
                parameter.fill_(0.5)
    model.save_pretrained(tmp_path / "model")
    decoder = Decoder(tmp_path / "model")
    settings = {"token_weights": ["none", "gradient"], "gradients": True}
    work = WorkFolder(tmp_path / "moments", decoder, "moments", "mllama", settings, "")
    collect(decoder, work, [family.batch()], CPU, torch.float32, ["none", "gradient"], True)
    known = Moments(tmp_path / "moments").read(1)
    assert {path.rpartition(".")[2] for path in known} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    for path in known:
        assert known[path].energy > 0, path
        assert known[path].hessian("gradient").diagonal().sum() > 0, path


@pytest.mark.parametrize("check", [gptq_exportable, aqlm_exportable])
def test_a_plain_checkpoint_does_not_hold_what_is_taken_apart(check, tmp_path):
    FAMILIES["phi3"].save(tmp_path)
    with pytest.raises(UserError, match="leave out --export"):
        check(Decoder(tmp_path), {"bits": 4, "group_size": 16})
