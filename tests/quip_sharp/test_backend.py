"""The backend contract: bytes, loading, forward, bad input, odd shapes."""

import pytest
import torch
from casp_quip_sharp.backend import QuipSharp
from casp_quip_sharp.linear import QuipSharpLinear
from casp_quip_sharp.trellis import tables

from casp.backend import load_backend
from casp.errors import UserError
from casp.model.swap import module_bytes, swap_modules

SHAPES = [(48, 64), (96, 37), (37, 96), (7, 12), (1, 8)]


TRELLIS = {"codebook": "trellis", "states": 8}


def quantized(weight, hessian, format, bias=None, dtype=torch.float32, **settings):
    """The loaded module of one matrix; format: or its bits with E8P12."""
    backend, format = QuipSharp(), {"bits": format} if isinstance(format, int) else format
    tensors = backend.quantize(weight, hessian, format, torch.Generator().manual_seed(0), **settings)
    module = backend.linear(*weight.shape, bias is not None, format, dtype)
    module.load_state_dict(tensors if bias is None else {**tensors, "bias": bias})
    return module


def test_found_by_its_entry_point():
    assert load_backend("quip-sharp").name == "quip-sharp"


@pytest.mark.parametrize(
    "format", [{"bits": bits} for bits in range(1, 5)] + [{**TRELLIS, "bits": bits} for bits in range(1, 7)], ids=str
)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_bytes_shapes_and_forward(correlated, rows, columns, format):
    weight, hessian = correlated(rows, columns)
    bias = torch.randn(rows)
    module = quantized(weight, hessian, format, bias)
    groups = -(-columns // 8)
    # E8P12 pads columns to groups of 8; the trellis pads nothing, and its bits fill bytes whatever the shape.
    codes = -(-rows * columns * format["bits"] // 8) if "codebook" in format else rows * groups * format["bits"]
    expected = codes + -(-rows // 8) + groups + 4
    assert QuipSharp().bytes(format, rows, columns) == module_bytes(module) == expected
    dense = module.dequantize()
    assert dense.shape == (rows, columns)
    x = torch.randn(2, 3, columns)
    y = module(x)
    assert (y.shape, y.dtype) == ((2, 3, rows), torch.float32)
    assert torch.allclose(y, x @ dense.T + bias, atol=1e-3 * dense.norm().item())
    assert not any(t.is_floating_point() and t.numel() > rows for t in module.state_dict().values())


@pytest.mark.parametrize("codebook", [{}, TRELLIS], ids=["e8p", "trellis"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_more_bits_less_error(correlated, weighted_error, bits, codebook):
    weight, hessian = correlated(48, 64)
    zero = weighted_error(weight, torch.zeros_like(weight), hessian)
    module = quantized(weight, hessian, {**codebook, "bits": bits})
    share = weighted_error(weight, module.dequantize(), hessian) / zero
    assert share < {1: 0.25, 2: 0.07, 3: 0.025, 4: 0.008}[bits]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_scale(correlated, dtype):
    weight, hessian = correlated(48, 64)
    module = quantized(weight, hessian, 3)
    dense, x = module.dequantize(), torch.randn(4, 64)
    module = module.to(dtype)  # casts all floating buffers
    assert torch.equal(module.dequantize(), dense)
    y = module(x.to(dtype))
    assert y.dtype == dtype
    assert torch.allclose(y.float(), x @ dense.T, atol=0.03 * (x @ dense.T).abs().max().item())


@pytest.mark.parametrize("codebook", [{}, TRELLIS, {**TRELLIS, "states": 12}], ids=str)
def test_a_layer_swapped_in_on_the_meta_device_has_its_constants(codebook):
    """A checkpoint is opened where new tensors are on the meta device; nothing was computed before."""
    tables._kernel_tensors.cache_clear()
    model = torch.nn.Sequential(torch.nn.Linear(64, 48, device="meta"))
    with torch.device("meta"):
        swap_modules(model, {"backend": "quip-sharp", "modules": {"0": {"format": {"bits": 2, **codebook}}}})
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    held = model[0]._constants
    assert not any(isinstance(one, torch.Tensor) and one.is_meta for one in held.coding)


def test_a_codebook_that_does_not_exist():
    for format, message in (
        ({"bits": 2, "codebook": "e9"}, "no codebook 'e9'; use e8p or trellis"),
        ({**TRELLIS, "bits": 7}, "--bits 7 is not a rate of the trellis; use 1, 2, 3, 4, 5, 6"),
        ({**TRELLIS, "bits": 2, "states": 9}, "--trellis-states 9 is no size of the trellis; use 8, 10, 12"),
    ):
        with pytest.raises(UserError, match=message):
            QuipSharp().bytes(format, 8, 8)


def test_tuned_vectors_of_the_trellis(correlated, weighted_error):
    weight, hessian = correlated(48, 64)
    format = QuipSharp().format(2, True, "trellis")
    module = quantized(weight, hessian, format)
    assert set(QuipSharp().tunable(module)) == {"out_vector", "in_vector"}
    x = torch.randn(3, 64)
    assert torch.allclose(module(x), x @ module.dequantize().T, atol=1e-3 * module.dequantize().norm().item())
    signs = quantized(weight, hessian, {**TRELLIS, "bits": 2})
    errors = [weighted_error(weight, one.dequantize(), hessian) for one in (module, signs)]
    assert errors[0] < 1.1 * errors[1]  # scales of columns are among what is compared


def test_same_seed_same_tensors_other_seed_other_signs(correlated):
    weight, hessian = correlated(16, 24)
    runs = [
        QuipSharp().quantize(weight, hessian, {"bits": 2}, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["in_signs"], runs[2]["in_signs"])


def test_the_empty_module_builds_on_meta():
    module = QuipSharp().linear(16, 24, True, {"bits": 4}, torch.bfloat16, "meta")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    assert isinstance(module, QuipSharpLinear)
    assert "bits=4" in repr(module)


def test_tuned_vectors_start_as_the_signs_and_take_gradients(correlated):
    weight, hessian = correlated(16, 37)
    backend, seed = QuipSharp(), torch.Generator().manual_seed(0)
    format = backend.format(2, tuned=True)
    module = backend.linear(16, 37, True, format)
    bias = torch.randn(16)
    module.load_state_dict({**backend.quantize(weight, hessian, format, seed, search_scale=False), "bias": bias})
    signs = quantized(weight, hessian, 2, bias, search_scale=False)
    assert torch.allclose(module.dequantize(), signs.dequantize(), atol=1e-5)
    assert backend.bytes(format, 16, 37) == module_bytes(module) == 16 * 5 * 2 + 2 * (16 + 40)
    moved = backend.tunable(module)
    assert set(moved) == {"out_vector", "in_vector", "bias"}
    assert set(backend.tunable(signs)) == {"bias"}
    leaves = {name: tensor.detach().double().float().requires_grad_() for name, tensor in moved.items()}
    x = torch.randn(3, 37)
    y = torch.func.functional_call(module, leaves, (x,))
    assert torch.allclose(y, signs(x), atol=1e-4)
    gradients = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        with torch.no_grad():
            step = 1e-2 * torch.randn_like(gradient)
            losses = [
                torch.func.functional_call(module, {**leaves, name: leaves[name] + sign * step}, (x,)).square().sum()
                for sign in (1, -1)
            ]
        assert ((losses[0] - losses[1]) / 2).item() == pytest.approx((gradient * step).sum().item(), rel=2e-2, abs=0.05)


def test_zeros_and_inputs_that_never_occur(correlated, weighted_error):
    weight, hessian = correlated(16, 24)
    assert not quantized(torch.zeros_like(weight), hessian, 2).dequantize().any()
    assert torch.isfinite(quantized(weight, torch.zeros_like(hessian), 2).dequantize()).all()
    hessian[:, 4:9] = hessian[4:9] = 0
    dense = quantized(weight, hessian, 2).dequantize()
    assert weighted_error(weight, dense, hessian) < 0.1 * weighted_error(weight, 0 * weight, hessian)


@pytest.mark.parametrize("bits", [0, 5, 8])
def test_bits_that_do_not_exist(bits):
    with pytest.raises(UserError, match=f"--bits {bits} "):
        QuipSharp().format(bits)


def test_bad_input(correlated):
    weight, hessian = correlated(16, 24)
    with pytest.raises(UserError, match="does not fit a weight of 24 columns"):
        QuipSharp().quantize(weight, hessian[:8, :8], {"bits": 2}, None)
    weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        QuipSharp().quantize(weight, hessian, {"bits": 2}, None)
    weight[0, 0], hessian[0, 0] = 0, float("inf")
    with pytest.raises(UserError, match="NaN or infinity"):
        QuipSharp().quantize(weight, hessian, {"bits": 2}, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_forward_agrees(correlated):
    weight, hessian = correlated(48, 64)
    module, x = quantized(weight, hessian, 3), torch.randn(4, 64)
    assert torch.allclose(module.cuda()(x.cuda()).cpu(), module.cpu()(x), atol=1e-4)
