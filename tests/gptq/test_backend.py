"""The backend's contract: exact bytes, tensors that load, a forward equal to the dense one."""

import pytest
import torch
from casp_gptq.backend import GPTQ
from casp_gptq.gptq import gptq_quantize

from casp.backend import Backend, load_backend
from casp.linear import LowRankLinear
from casp.plan.costs import Pricing, price
from casp.run.files import write_shard

SHAPES = [(64, 96), (36, 576), (576, 72), (33, 31), (1, 1)]


def quantized_layer(weight, hessian, format, bias=None, dtype=torch.float32):
    backend = GPTQ()
    layer = backend.linear(*weight.shape, bias is not None, format, dtype=dtype, device="meta")
    tensors = backend.quantize(weight, hessian, format, None)
    layer.load_state_dict(tensors if bias is None else {**tensors, "bias": bias}, assign=True)
    return layer


def test_is_found_by_name_and_keeps_the_contract():
    backend = load_backend("gptq")
    assert isinstance(backend, GPTQ)
    assert isinstance(backend, Backend)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 128, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_tensors(shape, group_size, bits):
    backend = GPTQ()
    format = backend.format(bits, group_size)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tensors = backend.quantize(weight, torch.eye(shape[1]), format, clip_steps=0, sweeps=0)
    assert backend.bytes(format, *shape) == sum(t.numel() * t.element_size() for t in tensors.values())
    layer = backend.linear(*shape, False, format)
    assert {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in tensors.items()
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_that_of_the_dequantized_weight(correlated, bits, dtype):
    weight, hessian = correlated(40, 84)
    bias = torch.randn(40, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = quantized_layer(weight, hessian, {"bits": bits, "group_size": 32}, bias, dtype)
    expected = gptq_quantize(weight, hessian, bits, 32).dequantize()
    assert torch.equal(layer.dequantize(), expected)
    assert torch.equal(layer.weight, expected)
    x = torch.randn(2, 5, 84, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = torch.nn.functional.linear(x.double(), expected.double(), bias.double())
    # Half a step of 14 bits for an activation, at most; the digits of the dtype for a weight and for an output.
    steps = x.double().abs().amax(-1, keepdim=True) / 16510 * expected.double().abs().sum(1)
    digits = torch.nn.functional.linear(x.double().abs(), expected.double().abs(), bias.double().abs())
    assert ((y.double() - exact).abs() <= 1.01 * steps + torch.finfo(dtype).eps * digits).all()
    assert not [t for t in [*layer.buffers(), *layer.parameters()] if t.numel() >= weight.numel()]


def test_the_factors_of_a_low_rank_layer(correlated, weighted_error):
    dense, hessian = correlated(64, 96)
    layer = LowRankLinear(96, 64, 18, bias=True)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    layer.down.weight.data = s[:18, None].sqrt() * vh[:18]
    layer.up.weight.data = u[:, :18] * s[:18].sqrt()
    format = {"bits": 4, "group_size": 32}
    inner = layer.down.weight.data @ hessian @ layer.down.weight.data.T
    down = quantized_layer(layer.down.weight.data, hessian, format)
    up = quantized_layer(layer.up.weight.data, inner, format, layer.up.bias.data)
    x = torch.randn(300, 96, generator=torch.Generator().manual_seed(3)) @ torch.linalg.cholesky(hessian).T
    exact = layer(x)
    layer.down, layer.up = down, up
    assert (layer(x) - exact).norm() < 0.1 * exact.norm()
    assert torch.allclose(layer.weight, up.dequantize() @ down.dequantize())


def test_tunable_are_scales_and_bias(correlated):
    weight, hessian = correlated(8, 32)
    format = {"bits": 2, "group_size": 16}
    assert set(GPTQ().tunable(quantized_layer(weight, hessian, format))) == {"scales"}
    assert set(GPTQ().tunable(quantized_layer(weight, hessian, format, torch.zeros(8)))) == {"scales", "bias"}


def test_two_runs_write_the_same_bytes(correlated, tmp_path):
    for name in ("a", "b"):
        tensors = GPTQ().quantize(*correlated(48, 96), {"bits": 3, "group_size": 64})
        write_shard(tmp_path / name, tensors)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("columns", "group_size"), [(128, 64), (150, 64), (72, 128), (40, -1)])
def test_distortions_are_those_of_gaussian_matrices(bits, columns, group_size):
    """White inputs, for which nothing is fed back; groups whole and short."""
    backend = GPTQ()
    weight = torch.randn(512, columns, generator=torch.Generator().manual_seed(3))
    layer = quantized_layer(weight, torch.eye(columns), backend.format(bits, group_size))
    error = (weight - layer.dequantize()).square().mean().item()
    assert backend.distortion(layer.format, 512, columns) == pytest.approx(error, rel=0.05)


def test_prices_told_by_distortions_are_what_trying_finds(correlated, monkeypatch):
    weight, hessian = correlated(96, 160)

    class Known:
        energy, tokens, losses, gradient_moment = 2.0, 1, 1, torch.eye(96)

        def hessian(self, weighting, sized_as=None):
            return hessian.float()

    pricing = Pricing(load_backend("gptq"), low_rank=frozenset({"q"}))
    tried = pricing.measured(pricing.formats((96, 160)), (96, 160))
    assert [(one["bits"], one["group_size"]) for one in tried] == [(2, 128), (2, 64), (3, 128)]
    told = price(pricing, weight, Known(), "q", "here")
    monkeypatch.setattr(GPTQ, "fine", 0.0)
    for one, other in zip(told, price(pricing, weight, Known(), "q", "here"), strict=True):
        assert one.cost == pytest.approx(other.cost, rel=0.25)  # a bit makes a factor of 4
