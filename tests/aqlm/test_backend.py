"""The backend's contract: exact bytes, layers that decode what was stored, errors, determinism."""

import pytest
import torch
from casp_aqlm.scheme import Scheme
from hypothesis import given, settings
from hypothesis import strategies as st

from casp.backend import load_backend
from casp.errors import UserError
from casp.finetune.in_block import Masters
from casp.plan.costs import Pricing, key, price
from casp.rounding import weighted_error

SETTINGS = {"max_rounds": 2, "name": "layer"}


def quantized(matrix, scheme, entries="float16", rows=40, columns=64, seed=0):
    backend = load_backend("aqlm")
    format = backend.format(scheme, entries)
    weight, hessian = matrix(rows, columns)
    tensors = backend.quantize(weight, hessian, format, torch.Generator().manual_seed(seed), **SETTINGS)
    layer = backend.linear(rows, columns, False, format)
    layer.load_state_dict(tensors)
    return backend, format, weight, hessian, tensors, layer


@given(
    st.integers(1, 8),
    st.integers(1, 16),
    st.integers(1, 32),
    st.sampled_from(["float16", "int8", "float8"]),
    st.integers(1, 70),
    st.integers(1, 70),
)
@settings(deadline=None)  # the first call loads the backend
def test_bytes_are_those_of_the_stored_tensors(count, bits, group, entries, rows, columns):
    backend = load_backend("aqlm")
    format = backend.format(f"{count}x{bits}g{group}", entries)
    layer = backend.linear(rows, columns, True, format, device="meta")
    stored = [tensor for name, tensor in layer.state_dict().items() if name != "bias"]
    assert backend.bytes(format, rows, columns) == sum(t.numel() * t.element_size() for t in stored)


def test_named_schemes_cost_what_their_names_say():
    backend = load_backend("aqlm")
    for scheme, bits in [("2x8g8", 2), ("1x8g4", 2), ("3x8g12", 2), ("2x12g8", 3), ("4x8g8", 4), ("1x16g8", 2)]:
        parsed = Scheme.parse(scheme)
        assert backend.format(scheme)["bits"] == bits
        codebooks = parsed.codebooks * parsed.size * parsed.group * 2
        assert backend.bytes(backend.format(scheme), 4096, 4608) == 4096 * 4608 * bits // 8 + codebooks + 2 * 4096


@pytest.mark.parametrize("scheme", ["2x4g8", "1x8g4", "3x4g6", "2x10g8", "1x12g8"])
@pytest.mark.parametrize("entries", ["float16", "int8", "float8"])
def test_a_layer_decodes_what_was_quantized(matrix, scheme, entries):
    _, _, weight, hessian, tensors, layer = quantized(matrix, scheme, entries)
    # Decoded by hand from the definition: the sum of the codewords times the row's scale.
    codes, parsed = layer.unpacked_codes(), Scheme.parse(scheme)
    dense = torch.zeros(40, parsed.padded(64))
    for row in range(40):
        for k in range(parsed.groups(64)):
            words = [tensors["codebooks"][m, codes[row, k, m]].float() for m in range(parsed.codebooks)]
            dense[row, k * parsed.group : (k + 1) * parsed.group] = sum(words) * tensors["scales"][row].float()
    assert torch.allclose(layer.dequantize(), dense[:, :64], atol=1e-6)
    assert weighted_error(weight, layer.dequantize(), hessian) < 0.4
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layer(x), x @ dense[:, :64].T, atol=1e-4)


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_threads(matrix):
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(quantized(matrix, "2x4g8", rows=96)[4])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_rows_of_zeros_and_inputs_that_never_occur(matrix):
    backend = load_backend("aqlm")
    weight, hessian = matrix(24, 32)
    weight[3] = 0
    hessian[:, 5] = hessian[5] = 0
    format = backend.format("2x4g8")
    tensors = backend.quantize(weight, hessian, format, torch.Generator().manual_seed(0), **SETTINGS)
    assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values())
    layer = backend.linear(24, 32, False, format)
    layer.load_state_dict(tensors)
    assert layer.dequantize()[3].abs().max() < 1e-5
    zeros = backend.quantize(torch.zeros(24, 32), hessian, format, torch.Generator().manual_seed(0), **SETTINGS)
    assert all(torch.isfinite(tensor.float()).all() for tensor in zeros.values())


def test_tunable_tensors_learn(matrix):
    backend, *_, layer = quantized(matrix, "2x4g8")
    tensors = {name: t.detach().float().requires_grad_() for name, t in backend.tunable(layer).items()}
    assert set(tensors) == {"codebooks", "scales"}
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    torch.func.functional_call(layer, tensors, (x,)).square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in tensors.values())


@pytest.mark.parametrize("text", ["2x8", "x8g8", "0x8g8", "2x17g8", "2x8g64", "9x8g8", "two"])
def test_a_scheme_that_is_none_is_named(text):
    with pytest.raises(UserError, match=text):
        load_backend("aqlm").format(text)


def test_bad_input_names_the_layer(matrix):
    backend = load_backend("aqlm")
    weight, hessian = matrix(8, 16)
    with pytest.raises(UserError, match=r"layer: a Hessian of shape \(16, 16\)"):
        backend.quantize(weight[:, :8], hessian, backend.format("2x4g8"), None, **SETTINGS)
    weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="layer: its weight holds NaN"):
        backend.quantize(weight, hessian, backend.format("2x4g8"), None, **SETTINGS)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from(["float16", "int8", "float8"]))
@settings(deadline=None)
def test_formats_ascend_and_small_matrices_get_small_codebooks(rows, columns, entries):
    backend = load_backend("aqlm")
    found = backend.formats(rows, columns, entries=entries)
    sizes = [backend.bytes(format, rows, columns) for format in found]
    assert sizes == sorted(sizes)
    assert sorted(format["bits"] for format in found) == [1, 1.5, 2, 2.5, 3, 4]
    two = backend.bytes(next(format for format in found if format["bits"] == 2), rows, columns)
    assert two <= backend.bytes(backend.format("2x8g8", entries), rows, columns)


def test_a_large_matrix_keeps_two_codebooks_and_a_low_rank_factor_does_not():
    backend = load_backend("aqlm")
    assert {"bits": 2.0, "scheme": "2x8g8", "entries": "float16"} in backend.formats(4096, 4096)
    assert {"bits": 2.0, "scheme": "1x8g4", "entries": "float16"} in backend.formats(72, 576, entries="float16")
    assert {"bits": 2.0, "scheme": "1x8g4", "entries": "int8"} in backend.formats(72, 576)


def test_whole_numbers_hold_codebooks_better_than_float8_and_learn(matrix):
    errors = {}
    for entries in ("float16", "int8", "float8"):
        _, _, weight, hessian, _, layer = quantized(matrix, "2x6g8", entries, rows=400)
        errors[entries] = weighted_error(weight, layer.dequantize(), hessian)
    assert errors["float16"] <= errors["int8"] < errors["float8"]
    backend, *_, layer = quantized(matrix, "2x4g8", "int8")
    masters = Masters(backend.tunable(layer))
    with torch.no_grad():
        masters.leaves["codebooks"] += 0.6
        masters.leaves["codebooks"][0, 0, 0] = 1000
    before = layer.codebooks.clone()
    masters.write()
    assert layer.codebooks.dtype == torch.int8
    assert layer.codebooks[0, 0, 0] == 127
    assert torch.equal(layer.codebooks.flatten()[1:].int(), (before.flatten()[1:].int() + 1).clamp_max(127))


@pytest.mark.parametrize("scheme", ["1x8g8", "2x6g8", "2x8g8", "1x8g4", "1x10g4", "2x6g4", "2x8g4", "3x8g8"])
@pytest.mark.parametrize("rows", [128, 1024])
def test_distortions_are_those_of_gaussian_numbers(scheme, rows):
    """Of matrices of different sizes, to which codebooks are fitted more or less closely."""
    backend, generator = load_backend("aqlm"), torch.Generator().manual_seed(5)
    format = backend.format(scheme)
    weight = torch.randn(rows, 256, generator=generator)
    tensors = backend.quantize(weight, torch.eye(256), format, generator, name="gaussian", max_rounds=4)
    layer = backend.linear(rows, 256, False, format)
    layer.load_state_dict(tensors)
    error = (weight - layer.dequantize()).square().mean().item()
    assert backend.distortion(format, rows, 256) == pytest.approx(error, rel=0.25 if scheme == "3x8g8" else 0.15)


def test_prices_are_what_quantizing_the_whole_matrix_costs(matrix):
    """Of schemes that are tried on a part of the rows, and of those that are told by their distortions."""
    backend, (weight, hessian) = load_backend("aqlm"), matrix(1024, 256)

    class Known:
        energy, tokens, losses, gradient_moment = 2.0, 1, 1, None

        def hessian(self, weighting, sized_as=None):
            return hessian.float()

    pricing = Pricing(backend, low_rank=frozenset())
    tried = [format["scheme"] for format in pricing.measured(pricing.formats((1024, 256)), (1024, 256))]
    assert tried == ["1x8g8", "2x6g8", "2x8g8"]
    assert len(pricing.extent.of(weight)) == 512
    told = {option.formats[0]["scheme"]: option for option in price(pricing, weight, Known(), "up", "here")}
    for scheme in ("1x8g8", "2x8g8", "1x10g4"):
        format = told[scheme].formats[0]
        tensors = backend.quantize(weight, hessian, format, torch.Generator().manual_seed(1), name="here")
        layer = backend.linear(1024, 256, False, format)
        layer.load_state_dict(tensors)
        error = weight - layer.dequantize()
        assert told[scheme].cost == pytest.approx(
            ((error @ hessian.float()) * error).sum().item() / 1024, rel=0.25
        )  # half a bit makes 1.8


def test_distortions_that_were_not_measured_are_not_told():
    """Of other schemes, and of few vectors for the entries: such formats are tried."""
    backend = load_backend("aqlm")
    assert backend.distortion(backend.format("3x8g12"), 1024, 1024) == float("inf")
    assert backend.distortion(backend.format("2x8g8"), 192, 27) == float("inf")
    assert backend.distortion(backend.format("2x8g8"), 192, 256) < 0.1
    pricing = Pricing(backend, low_rank=frozenset())
    assert pricing.measured(pricing.formats((10, 64)), (10, 64)) == pricing.formats((10, 64))
    assert set(pricing.record()["distortions"]) >= {key(format) for format in pricing.formats((1024, 1024))}
