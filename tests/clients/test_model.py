"""What a loaded model can do besides computing: change dtype, become dense, be saved, be trained."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from casp_gptq.linear import GPTQLinear
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config
from transformers.trainer_utils import validate_quantization_for_training

from casp import kernels
from casp.clients.accelerate import prepare
from casp.linear import LowRankLinear, QuantizedLinear

IDS = torch.arange(4, 36).reshape(2, 16)
COMPRESSED = (QuantizedLinear, LowRankLinear)


@pytest.fixture(params=["gptq", "low_rank", "gptq_low_rank"])
def compressed(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def load(folder: Path, **options: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("change", [lambda model: model.bfloat16(), lambda model: model.to(torch.bfloat16)])
def test_packed_tensors_keep_their_dtype(gptq: Path, change):
    model = load(gptq)
    layer = model.model.layers[0].self_attn.q_proj
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    change(model)
    after = layer.state_dict()
    assert layer.scales.dtype == torch.float16
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.bfloat16
    model.to("meta")
    assert layer.scales.is_meta


def test_dequantize_gives_the_dense_model(compressed: Path, tmp_path: Path):
    model = load(compressed)
    weights = {
        path: (module.weight.detach().float(), module.bias)
        for path, module in model.named_modules()
        if isinstance(module, COMPRESSED)
    }
    dense = model.dequantize()
    assert not any(isinstance(module, COMPRESSED) for module in dense.modules())
    for path, (weight, bias) in weights.items():
        if path.rpartition(".")[2] in ("down", "up"):
            continue  # the factors are gone, their product is there
        linear = dense.get_submodule(path)
        assert type(linear) is nn.Linear
        torch.testing.assert_close(linear.weight, weight, rtol=0, atol=0)
        assert (linear.bias is None) == (bias is None)
    dense.save_pretrained(tmp_path / "dense")
    again = load(tmp_path / "dense")
    assert not hasattr(again.config, "quantization_config")
    torch.testing.assert_close(again(IDS).logits, dense(IDS).logits, rtol=0, atol=0)


def test_accelerate_loads_into_an_empty_model(compressed: Path):
    expected = load(compressed)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(compressed))
    model = load_checkpoint_and_dispatch(model, compressed, device_map="auto")
    assert [type(module) for module in model.modules()] == [type(module) for module in expected.modules()]
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=0, atol=0)


def test_accelerate_takes_apart_what_the_model_fuses():
    """Once, though accelerate's two functions call each other."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32, "pad_token_id": 0}
    config = Phi3Config(num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **sizes)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    fused = "model.layers.0.self_attn.qkv_proj"
    compression = {
        "quant_method": "casp",
        "version": 2,
        "backend": "gptq",
        "original_weights": 64 * 64,
        "modules": {f"{fused}.q": {"format": {"bits": 4, "group_size": 32}}},
        "splits": {fused: {"parts": {"q": 64, "k": 32, "v": 32}, "groups": 1}},
    }
    for _ in range(2):
        prepare(model, compression)
        parts = {name: type(part) for name, part in model.get_submodule(fused).named_children()}
        assert parts == {"q": GPTQLinear, "k": nn.Linear, "v": nn.Linear}


def test_saved_in_part_dense(gptq: Path, tmp_path: Path):
    """What is saved is described as it stands, also where somebody made some layers dense."""
    model = load(gptq)
    attention = model.model.layers[1].self_attn
    linear = nn.Linear(attention.q_proj.in_features, attention.q_proj.out_features, bias=False)
    linear.weight = nn.Parameter(attention.q_proj.weight.clone())
    attention.q_proj = linear
    model.save_pretrained(tmp_path / "mixed")
    again = load(tmp_path / "mixed")
    assert type(again.model.layers[1].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=0)


def test_a_copy_is_saved_alike(gptq_low_rank: Path, tmp_path: Path):
    model = copy.deepcopy(load(gptq_low_rank))
    model.save_pretrained(tmp_path / "copy", max_shard_size="20KB")
    torch.testing.assert_close(load(tmp_path / "copy")(IDS).logits, model(IDS).logits, rtol=0, atol=0)


@pytest.mark.skipif(kernels.operators() is None, reason="quiptools is not built")
def test_gradients_of_inputs_go_through_the_kernels(gptq_low_rank: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither a forward pass outside no_grad nor an adapter below takes the plain path."""
    model = load(gptq_low_rank)
    dense = load(gptq_low_rank).dequantize()
    monkeypatch.setattr(kernels.Reference, "run", lambda *_: pytest.fail("the plain version was taken"))
    model(IDS[:, :4])
    gradients = []
    for one in (model, dense):
        embedded = one.get_input_embeddings()(IDS[:, :4]).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.square().mean().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.01 * gradients[1].abs().max().item())


def test_low_rank_factors_train_packed_codes_do_not(low_rank: Path, gptq: Path):
    validate_quantization_for_training(load(low_rank))
    with pytest.raises(ValueError, match="attach trainable adapters"):
        validate_quantization_for_training(load(gptq))
