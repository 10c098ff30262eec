"""Every implementation of AQLM's layer against float64, with groups, codes and sizes that fill no byte."""

import copy

import pytest
import torch
from casp_aqlm.linear import AQLMLinear
from casp_aqlm.packing import pack
from casp_aqlm.scheme import Scheme
from hypothesis import given, settings
from hypothesis import strategies as st

from casp.kernels import has_operator, implementations
from casp.linear import stored_as

BUILT = has_operator("aqlm_layer", "cpu")
ON_CUDA = has_operator("aqlm_layer", "cuda") and torch.cuda.is_available()
RUN = {"reference": True, "cuda": ON_CUDA}
IMPLEMENTATIONS = [one for one in implementations() if RUN.get(one.name, BUILT)]
needs_kernel = pytest.mark.skipif(not BUILT, reason="quiptools is not built with this operator")


def random_layer(scheme, out_features, in_features, entries="float16", bias=True, seed=0):
    """A layer and its float64 weight, computed from the codes before they are packed."""
    generator = torch.Generator().manual_seed(seed)
    layer = AQLMLinear(out_features, in_features, bias, Scheme.parse(scheme, entries).format)
    parsed = layer.scheme
    shape = (out_features, parsed.groups(in_features), parsed.codebooks)
    codes = torch.randint(0, parsed.size, shape, generator=generator)
    codebooks = torch.randn(parsed.codebooks, parsed.size, parsed.group, generator=generator)
    layer.codes.copy_(pack(codes.flatten(1), parsed.code_bits))
    layer.codebooks.copy_(stored_as(4 * codebooks, layer.codebooks.dtype))
    layer.scales.copy_(torch.rand(out_features, generator=generator))
    if bias:
        layer.bias.data.normal_(generator=generator)
    stored = layer.codebooks.double()
    words = torch.stack([stored[m][codes[..., m]] for m in range(parsed.codebooks)])
    weight = words.sum(0).flatten(1)[:, :in_features] * layer.scales.double()[:, None]
    return layer, weight


def run(one, layer, x, must=False):
    """What an implementation makes of x, on the device that it is for."""
    device = "cuda" if one.name == "cuda" else "cpu"
    kernel, there = copy.deepcopy(layer).to(device).kernel(), x.to(device)
    with torch.no_grad():
        assert not must or one.can(kernel, there)
        return one.run(kernel, there).cpu()


def check(one, layer, weight, x):
    """One implementation on x (vectors, in): its sums in float32 and the dtype's own digits."""
    y = run(one, layer, x, must=True)
    bias = 0 if layer.bias is None else layer.bias.double()
    size = 0 if layer.bias is None else layer.bias.double().abs()
    assert (y.dtype, y.shape) == (x.dtype, (x.shape[0], weight.shape[0]))
    digits = max(torch.finfo(x.dtype).eps, 4e-6)
    allowed = digits * (x.double().abs() @ weight.abs().T * 2 + size) + 1e-6
    assert ((y.double() - (x.double() @ weight.T + bias)).abs() <= allowed).all()


@pytest.mark.parametrize("one", IMPLEMENTATIONS, ids=lambda one: one.name)
@pytest.mark.parametrize("scheme", ["2x8g8", "1x8g4", "4x8g8", "3x8g12", "2x5g8", "1x3g5", "2x12g8", "1x16g8"])
def test_layer_agrees_with_float64(one, scheme):
    for out_features, in_features, entries in [
        (300, 136, "float16"),
        (256, 64, "float8"),
        (17, 100, "float16"),
        (1, 5, "float8"),
    ]:
        layer, weight = random_layer(scheme, out_features, in_features, entries, bias=out_features != 256)
        for batch in (1, 3, 9, 17):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.randn(batch, in_features, generator=torch.Generator().manual_seed(batch)).to(dtype)
                check(one, layer, weight, x)


def test_a_build_that_lacks_an_operator_is_no_error():
    assert not has_operator("no_such_layer", "cpu")


@needs_kernel
@given(
    st.integers(1, 4),
    st.integers(1, 11),
    st.integers(1, 17),
    st.integers(1, 300),
    st.integers(1, 90),
    st.integers(1, 18),
    st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(codebooks, bits, group, out_features, in_features, batch, seed):
    layer, weight = random_layer(f"{codebooks}x{bits}g{group}", out_features, in_features, seed=seed)
    x = torch.randn(batch, in_features, generator=torch.Generator().manual_seed(seed))
    for one in IMPLEMENTATIONS:
        check(one, layer, weight, x)


@needs_kernel
@pytest.mark.parametrize("scheme", ["2x8g8", "3x8g8", "2x12g8", "1x16g8", "1x8g4"])
def test_many_groups_and_outliers_among_the_inputs(scheme):
    layer, weight = random_layer(scheme, 600, 1096, "int8" if scheme == "3x8g8" else "float16")
    x = torch.randn(2, 1096, generator=torch.Generator().manual_seed(0))
    x[:, 700] = 300
    for one in IMPLEMENTATIONS:
        for dtype in (torch.float32, torch.float16):
            check(one, layer, weight, x.to(dtype))


@needs_kernel
@pytest.mark.parametrize("scheme", ["1x8g32", "2x8g32", "3x8g12"])
def test_wide_groups_that_the_columns_do_not_fill(scheme):
    layer, weight = random_layer(scheme, 300, 2100)
    x = torch.randn(3, 2100, generator=torch.Generator().manual_seed(0))
    for one in IMPLEMENTATIONS:
        for dtype in (torch.float32, torch.bfloat16):
            check(one, layer, weight, x.to(dtype))


@needs_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_comes_out(bad):
    layer, _ = random_layer("2x8g8", 300, 1096)
    x = torch.randn(2, 1096, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[1, 900] = bad
    for one in IMPLEMENTATIONS:
        y = run(one, layer, x)
        assert torch.isfinite(y[0]).all()
        assert not torch.isfinite(y[1]).any()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_the_sums(dtype):
    layer, _ = random_layer("2x8g8", 700, 256)
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(layer(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@needs_kernel
def test_gradients_pass_through_the_kernel_to_the_input_and_through_the_plain_version_to_codebooks():
    layer, weight = random_layer("2x8g8", 300, 64)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad.double(), weight.sum(0).expand(3, -1), rtol=1e-4, atol=1e-3)
    layer.scales.requires_grad_()
    assert not next(one for one in IMPLEMENTATIONS if one.name != "reference").can(layer.kernel(), x)
    layer(x).sum().backward()
    assert layer.scales.grad.abs().sum() > 0
