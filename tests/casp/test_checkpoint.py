"""Compressed checkpoints through transformers: loading, size in memory and on disk, generating, saving."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from casp.errors import UserError
from casp.linear import LowRankLinear, QuantizedLinear
from casp.model.checkpoint import resident_bytes, size
from casp.model.decoder import Decoder
from casp.model.swap import swap_modules
from casp.run.writer import RunFolder

from .test_run import BATCHES, CPU, toy_stage

MODELS = ["tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_llava"]


def factory(folder: Path):
    return (
        AutoModelForImageTextToText if "vision_config" in (folder / "config.json").read_text() else AutoModelForCausalLM
    )


def low_rank(folder: Path, output: Path, rank: int = 5) -> Path:
    """A checkpoint whose q and k are cut to `rank` by a plain SVD."""
    decoder = Decoder(folder)
    run = RunFolder(output, decoder, "svd", "tiny", {"rank": rank}, "")
    for visit in run.walk(BATCHES, CPU, torch.float32):
        for role in ("q", "k"):
            path = visit.linears[role]
            old = visit.block.get_submodule(path)
            u, s, v = torch.linalg.svd(old.weight, full_matrices=False)
            new = LowRankLinear(old.in_features, old.out_features, rank, old.bias is not None)
            new.up.weight.data = u[:, :rank] * s[:rank]
            new.down.weight.data = v[:rank]
            if old.bias is not None:
                new.up.bias.data = old.bias.data
            visit.block.self_attn.add_module(path.rpartition(".")[2], new)
        run.save(visit, {"linears": {"q": {"rank": rank}, "k": {"rank": rank}}})
    return run.finish()


@pytest.mark.parametrize("name", MODELS)
def test_quantized_low_rank_model_loads_at_its_size(name, request, tmp_path, toy_site):
    folder = request.getfixturevalue(name)
    factors = low_rank(folder, tmp_path / "svd")
    toy_stage(factors, tmp_path / "toy")
    loaded = factory(folder).from_pretrained(tmp_path / "toy").eval()
    kinds = {type(module).__name__ for module in loaded.modules() if isinstance(module, QuantizedLinear)}
    assert kinds == {"ToyLinear"}
    stored = sum(f.stat().st_size for f in (tmp_path / "toy").glob("*.safetensors"))
    buffers_not_stored = 64 * 1024
    assert resident_bytes(loaded) <= stored + buffers_not_stored
    dense = factory(folder).from_pretrained(folder)
    assert resident_bytes(loaded) < resident_bytes(dense)


@pytest.mark.parametrize("name", MODELS)
def test_compressed_logits_are_those_of_the_dense_equivalent(name, request, tmp_path, toy_site):
    folder = request.getfixturevalue(name)
    toy_stage(low_rank(folder, tmp_path / "svd"), tmp_path / "toy")
    loaded = factory(folder).from_pretrained(tmp_path / "toy").eval()
    dense = factory(folder).from_pretrained(folder).eval()
    for path, module in loaded.named_modules():
        if isinstance(module, LowRankLinear | QuantizedLinear) and not path.endswith((".down", ".up")):
            dense.get_submodule(path).weight.data = module.weight.detach().float()
    batch = {"input_ids": torch.arange(4, 20)[None]}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, dense(**batch).logits, atol=1e-4, rtol=1e-4)


def test_generating_with_a_cache_equals_generating_without(tiny_llama, tmp_path, toy_site):
    toy_stage(tiny_llama, tmp_path / "toy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "toy").eval()
    ids = torch.arange(10, 18)[None]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_round_trip(name, request, tmp_path, toy_site):
    folder = request.getfixturevalue(name)
    toy_stage(low_rank(folder, tmp_path / "svd"), tmp_path / "toy")
    first = factory(folder).from_pretrained(tmp_path / "toy")
    first.save_pretrained(tmp_path / "again")
    second = factory(folder).from_pretrained(tmp_path / "again")
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype, key
        assert torch.equal(tensor, b[key]), key
    assert size(tmp_path / "again") == size(tmp_path / "toy")


def test_what_is_not_compressed_is_stored_byte_for_byte(tiny_qwen2, tmp_path):
    out = low_rank(tiny_qwen2, tmp_path / "svd")
    before, after = Decoder(tiny_qwen2).shards, Decoder(out).shards
    same = set(before.entries) & set(after.entries)
    assert {"model.layers.0.self_attn.v_proj.weight", "model.embed_tokens.weight", "model.norm.weight"} <= same
    for name in same:
        assert torch.equal(before.read_stored(name), after.read_stored(name)), name
    dropped = set(before.entries) - same
    assert all(".q_proj." in name or ".k_proj." in name for name in dropped)


def test_size_counts_every_tensor_of_the_linears(tiny_qwen2, tmp_path, toy_site):
    q, k, rest = (64 * 64, 32 * 64, 32 * 64 + 64 * 64 + 3 * 96 * 64)
    weights = 3 * (q + k + rest)
    plain = size(tiny_qwen2)
    assert (plain.bytes, plain.original_weights, plain.bpw) == (4 * weights, weights, 32)
    factors = low_rank(tiny_qwen2, tmp_path / "svd", rank=5)
    expected = 3 * 4 * (5 * (64 + 64) + 5 * (32 + 64) + rest)
    assert (size(factors).bytes, size(factors).original_weights) == (expected, weights)
    toy_stage(factors, tmp_path / "toy")
    rows = 3 * (5 + 64 + 5 + 32 + 32 + 64 + 96 + 96 + 64)
    assert size(tmp_path / "toy").bytes == expected // 4 + 2 * rows
    assert size(tmp_path / "toy").original_weights == weights


def test_biases_follow_the_low_rank_layer(tiny_qwen2, tmp_path):
    out = low_rank(tiny_qwen2, tmp_path / "svd", rank=32)
    dense = AutoModelForCausalLM.from_pretrained(tiny_qwen2).eval()
    factors = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.equal(factors.model.layers[0].self_attn.k_proj.bias, dense.model.layers[0].self_attn.k_proj.bias)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = dense.model.layers[0].self_attn.k_proj(x)
        torch.testing.assert_close(factors.model.layers[0].self_attn.k_proj(x), expected)


def test_base_model_class_loads_too(tiny_llama, tmp_path, toy_site):
    toy_stage(tiny_llama, tmp_path / "toy")
    model = AutoModel.from_pretrained(tmp_path / "toy")
    assert type(model.layers[0].mlp.up_proj).__name__ == "ToyLinear"


def test_half_precision_asks_nothing_of_the_packed_tensors(tiny_llama, tmp_path, toy_site):
    toy_stage(tiny_llama, tmp_path / "toy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "toy", dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.scales.dtype == torch.float16
    assert model(torch.arange(4, 20)[None]).logits.dtype == torch.bfloat16


def test_damaged_configs_are_named(tiny_llama, tmp_path, toy_site):
    toy_stage(tiny_llama, tmp_path / "toy")
    config = json.loads((tmp_path / "toy" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    modules = {"model.layers.9.mlp.up_proj": {"rank": 3}}
    with pytest.raises(UserError, match=r"model\.layers\.9\.mlp\.up_proj"):
        swap_modules(model, {"backend": None, "modules": modules})
    with pytest.raises(UserError, match=r"self_attn is a LlamaAttention"):
        swap_modules(model, {"backend": None, "modules": {"model.layers.0.self_attn": {"rank": 3}}})
    with pytest.raises(UserError, match="no backend called 'nowhere'"):
        swap_modules(model, config["quantization_config"] | {"backend": "nowhere"})
    with pytest.raises(UserError, match="backend 'absent' does not import"):
        swap_modules(model, config["quantization_config"] | {"backend": "absent"})
