"""Every implementation of GPTQ's layer against float64, with groups and sizes that fill no word."""

import pytest
import torch
from casp_gptq.linear import GPTQLinear
from casp_gptq.packing import pack
from hypothesis import given, settings
from hypothesis import strategies as st

from casp.kernels import implementations, operators

IMPLEMENTATIONS = [one for one in implementations() if one.name != "cuda"]
KERNELS = [one for one in IMPLEMENTATIONS if one.name != "reference"]
needs_kernels = pytest.mark.skipif(not KERNELS, reason="quiptools is not built")


def random_layer(bits, out_features, in_features, group_size, bias=True, seed=0):
    """A layer and its float64 weight, computed from the codes before they are packed."""
    generator = torch.Generator().manual_seed(seed)
    width = in_features if group_size == -1 else group_size
    group = torch.arange(in_features) // width
    groups = int(group[-1]) + 1
    codes = torch.randint(0, 1 << bits, (in_features, out_features), generator=generator)
    zeros = torch.randint(0, 1 << bits, (groups, out_features), generator=generator)
    scales = (torch.rand(groups, out_features, generator=generator) / 2**bits).half()
    layer = GPTQLinear(out_features, in_features, bias, {"bits": bits, "group_size": group_size})
    layer.qweight.copy_(pack(codes, bits))
    layer.qzeros.copy_(pack(zeros.T.contiguous(), bits).T)
    layer.scales.copy_(scales)
    if bias:
        layer.bias.data.normal_(generator=generator)
    return layer, ((codes - zeros[group]).double() * scales.double()[group]).T


def rounding(x, weight, group_size, dtype):
    """What an output may be off by, each column's half a step of 14 bits and the dtype's own digits."""
    width = weight.shape[1] if group_size == -1 else group_size
    step = torch.zeros_like(x, dtype=torch.float64)
    for first in range(0, x.shape[1], width):
        step[:, first : first + width] = x[:, first : first + width].abs().amax(1, keepdim=True).double() / 16510
    inputs = step @ weight.abs().T
    return 1.01 * inputs + torch.finfo(dtype).eps * (x.double().abs() @ weight.abs().T) + 1e-6


def check(one, layer, weight, x, group_size):
    """One implementation on x (vectors, in)."""
    kernel = layer.kernel()
    assert one.can(kernel, x)
    with torch.no_grad():
        y = one.run(kernel, x)
    bias = 0 if layer.bias is None else layer.bias.double()
    size = 0 if layer.bias is None else layer.bias.abs().double() * torch.finfo(x.dtype).eps
    assert (y.dtype, y.shape) == (x.dtype, (x.shape[0], weight.shape[0]))
    allowed = rounding(x, weight, group_size, x.dtype) + size
    assert ((y.double() - (x.double() @ weight.T + bias)).abs() <= allowed).all()


@pytest.mark.parametrize("one", IMPLEMENTATIONS, ids=lambda one: one.name)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layer_agrees_with_float64(one, bits):
    shapes = [(256, 512, 128), (64, 300, 64), (17, 100, 32), (33, 37, -1), (1, 5, 3), (48, 130, 20), (300, 64, 1)]
    for out_features, in_features, group_size in shapes:
        layer, weight = random_layer(bits, out_features, in_features, group_size, bias=out_features != 64)
        for batch in (1, 2, 7, 16, 17):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.randn(batch, in_features, generator=torch.Generator().manual_seed(batch)).to(dtype)
                check(one, layer, weight, x, group_size)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    out_features=st.integers(1, 90),
    in_features=st.integers(1, 300),
    group_size=st.one_of(st.just(-1), st.integers(1, 320)),
    batch=st.integers(1, 18),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(bits, out_features, in_features, group_size, batch, seed):
    layer, weight = random_layer(bits, out_features, in_features, group_size, seed=seed)
    x = torch.randn(batch, in_features, generator=torch.Generator().manual_seed(seed))
    for one in IMPLEMENTATIONS:
        check(one, layer, weight, x, group_size)


@needs_kernels
def test_largest_numbers_overflow_nothing():
    for bits, code in ((2, 3), (3, 7), (4, 15), (8, 255)):
        layer, _ = random_layer(bits, 32, 512, -1, bias=False)
        layer.qweight.copy_(pack(torch.full((512, 32), code), bits))
        layer.qzeros.zero_()
        layer.scales.fill_(1)
        for one in KERNELS:
            for sign in (1.0, -1.0):
                y = one.run(layer.kernel(), torch.full((1, 512), sign))
                assert torch.allclose(y, torch.full((1, 32), sign * 512 * code), rtol=1e-6)


@needs_kernels
def test_the_same_bytes_on_every_set_and_number_of_threads():
    before = torch.get_num_threads()
    layer, _ = random_layer(3, 700, 500, 96)
    try:
        for batch in (1, 5, 16):
            x = torch.randn(batch, 500, generator=torch.Generator().manual_seed(1))
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found += [one.run(layer.kernel(), x) for one in KERNELS]
            assert all(torch.equal(y, found[0]) for y in found)
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_what_is_not_finite_stays_so():
    layer, _ = random_layer(4, 40, 64, 32)
    for value in (float("nan"), float("inf")):
        x = torch.ones(2, 64)
        x[0, 3] = value
        y = layer(x)
        assert not y[0].isfinite().any()
        assert y[1].isfinite().all()


def test_gradients_reach_x():
    layer, weight = random_layer(3, 24, 40, 16)
    x = torch.randn(2, 3, 40, requires_grad=True)
    upstream = torch.randn(2, 3, 24)
    layer(x).backward(upstream)
    assert torch.allclose(x.grad.double(), upstream.double() @ weight, atol=1e-5)
    assert layer(torch.randn(0, 40)).shape == (0, 24)


def test_scales_that_are_trained_get_their_gradient():
    """They come in float32, and only the plain version is differentiable in them."""
    layer, weight = random_layer(3, 24, 40, 16)
    scales = layer.scales.float().requires_grad_()
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    torch.func.functional_call(layer, {"scales": scales}, (x,)).sum().backward()
    by_column = x.double().sum(0) * weight / layer.scales.double()[torch.arange(40) // 16].T
    wanted = torch.stack([part.sum(1) for part in by_column.split(16, dim=1)])
    assert torch.allclose(scales.grad.double(), wanted, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "2, 3, 4 or 8 bits"),
        ({"group_size": 0}, "2, 3, 4 or 8 bits"),
        ({"words": torch.zeros(8, 32, dtype=torch.int64)}, "an int32 matrix of 8 rows"),
        ({"words": torch.zeros(7, 32, dtype=torch.int32)}, "an int32 matrix of 8 rows"),
        ({"scales": torch.zeros(2, 32)}, "a float16 matrix"),
        ({"zeros": torch.zeros(2, 3, dtype=torch.int32)}, "zeros are an int32 matrix"),
        ({"bias": torch.zeros(31)}, "a bias has 32"),
        ({"isa": "mmx"}, "does not run the instruction set mmx"),
    ],
)
def test_the_operator_refuses_what_does_not_fit(change, message):
    good = {"x": torch.zeros(1, 64), "words": torch.zeros(8, 32, dtype=torch.int32), "bits": 4, "group_size": 32}
    good |= {"zeros": torch.zeros(2, 4, dtype=torch.int32), "scales": torch.zeros(2, 32).half(), "bias": None}
    with pytest.raises(ValueError, match=message):
        operators().gptq_layer(**{**good, **change})
