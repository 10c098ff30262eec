"""The whole layer in one operator against the layer by parts, in float64, and what autograd sees of it."""

import pytest
import torch
from casp_quip_sharp.incoherence import original_weight
from casp_quip_sharp.linear import QuipSharpLinear

from casp.kernels import implementations

KERNELS = [one for one in implementations() if one.name.startswith("cpu-")]


def random_layer(codebook, bits, out_features, in_features, vectors="signs", bias=True):
    """A layer of random codes, its weight about as large as a real one's."""
    torch.manual_seed(bits)
    layer = QuipSharpLinear(out_features, in_features, bias, {"codebook": codebook, "bits": bits, "vectors": vectors})
    for name, buffer in layer.named_buffers():
        if buffer.dtype == torch.uint8:
            buffer.random_(0, 256)
        elif buffer.dtype == torch.int16:
            buffer.random_(-(2**15), 2**15)
        else:
            buffer.copy_(torch.randn(buffer.shape) / 16 if name != "scale" else torch.tensor(1 / 16))
    if bias:
        layer.bias.data.normal_()
    return layer


def dense(layer):
    """The weight, float64."""
    weight = original_weight(layer.points().double(), *(vector.double() for vector in layer.vectors()))
    return weight[:, : layer.in_features]


def exact(layer, x, weight=None):
    """float64, from the decoded points on; weight: what `dense` found before."""
    y = x.double() @ (dense(layer) if weight is None else weight).T
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("implementation", KERNELS, ids=lambda one: one.name)
@pytest.mark.parametrize("vectors", ["signs", "tuned"])
@pytest.mark.parametrize("codebook", ["e8p", "trellis"])
def test_layer_agrees_with_float64(implementation, codebook, vectors):
    sizes = ((1, 40, 64), (2, 192, 576), (3, 260, 100), (4, 90, 148), (2, 512, 37), (2, 448, 2304))  # the last by tiles
    for bits, out_features, in_features in sizes:
        layer = random_layer(codebook, bits, out_features, in_features, vectors, bias=bits != 3)
        weight = dense(layer)
        for shape in ((1,), (16,), (2, 9), (0,)):
            for dtype, tolerance in ((torch.float32, 5e-4), (torch.bfloat16, 0.03), (torch.float16, 4e-3)):
                x = torch.randn(*shape, in_features).to(dtype)
                kernel = layer._layer(dtype)
                assert implementation.can(kernel, x)
                with torch.no_grad():
                    y = implementation.run(kernel, x)
                assert (y.dtype, y.shape) == (dtype, (*shape, out_features))
                wanted = exact(layer, x, weight)
                size = wanted.square().mean().sqrt() if wanted.numel() else 0
                assert ((y - wanted).abs() <= tolerance * (size + wanted.abs())).all(), (bits, shape, dtype)


@pytest.mark.parametrize("codebook", ["e8p", "trellis"])
def test_gradients_reach_x_through_the_operator_and_vectors_through_the_parts(codebook):
    layer = random_layer(codebook, 2, 24, 40, "tuned")
    x = torch.randn(3, 40, requires_grad=True)
    layer(x).square().sum().backward()
    plain = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(plain, layer.weight, layer.bias).square().sum().backward()
    assert torch.allclose(x.grad, plain.grad, rtol=1e-2, atol=1e-2 * plain.grad.abs().max())
    layer.out_vector = torch.nn.Parameter(layer.out_vector)
    layer(x).sum().backward()
    assert layer.out_vector.grad is not None


@pytest.mark.skipif(not KERNELS, reason="quiptools is not built")
def test_a_forward_that_trains_nothing_takes_the_operator(monkeypatch):
    layer = random_layer("trellis", 2, 24, 40)
    monkeypatch.setattr(layer, "_plain", None)
    assert layer(torch.randn(1, 40)).requires_grad is False
    assert layer(torch.randn(1, 40, requires_grad=True)).requires_grad


@pytest.mark.parametrize("codebook", ["e8p", "trellis"])
def test_widths_whose_transform_has_no_kernel(codebook):
    layer = random_layer(codebook, 2, 16, 8 * 263)  # 263: Hartley's part goes through the FFT
    x = torch.randn(2, 8 * 263)
    assert torch.allclose(layer(x).double(), exact(layer, x), atol=1e-2)
