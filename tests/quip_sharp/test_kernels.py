"""Every implementation of the product and of the transform against float64; selection; what happens without kernels."""

import os
import sys
import warnings

import pytest
import torch
from casp_quip_sharp import hadamard
from casp_quip_sharp.codebooks import STAGES, table
from casp_quip_sharp.incoherence import random_signs, unpack_signs
from casp_quip_sharp.kernels import decoded, e8p_arguments, e8p_product, multiply_codes

from casp import kernels
from casp.kernels import Reference, implementations, operators

LARGEST_DIRECT_BATCH = 16  # kDirectBatch of product.h
IMPLEMENTATIONS = {one.name: one for one in implementations()}
KERNELS = [name for name in IMPLEMENTATIONS if name != "reference"]
SETS = operators().instruction_sets() if operators() else []
needs_kernels = pytest.mark.skipif(not KERNELS, reason=f"quiptools is not built: {kernels.BUILD}")


def product(x, codes, residual_codes, bits, dtype):
    """By the fastest implementation."""
    return multiply_codes(x, e8p_product(codes, residual_codes, bits, dtype), len(codes))


def random_codes(bits, rows, groups, seed=0):
    """Codes and residual codes (or None) of a random matrix (rows, 8 groups)."""
    generator = torch.Generator().manual_seed(seed)
    codes = []
    for stage in STAGES[bits]:
        low, high = (0, 256) if stage.dtype == torch.uint8 else (-32768, 32768)
        codes.append(torch.randint(low, high, (rows, groups), generator=generator).to(stage.dtype))
    return codes[0], codes[1] if len(codes) > 1 else None


def on_device_of(name, *tensors):
    """The tensors where the implementation of this name computes."""
    device = "cuda" if name == "cuda" else "cpu"
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "columns"), [(192, 576), (576, 1536), (33, 40), (37, 8), (1, 136), (8, 4096)], ids=lambda size: str(size)
)
def test_product_agrees_with_float64(name, bits, rows, columns):
    codes, residual_codes = random_codes(bits, rows, columns // 8)
    points = decoded(codes, residual_codes, bits).double()
    for batch in (1, 2, 3, 7, 16, 17, 300):
        x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch))
        exact = x.double() @ points.T
        size = (x.double().abs() @ points.abs().T).amax()
        x_there, *codes_there = on_device_of(name, x, codes, residual_codes)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            y = IMPLEMENTATIONS[name].run(e8p_product(*codes_there, bits, dtype), x_there).cpu()
            assert (y.shape, y.dtype) == ((batch, rows), torch.float32)
            assert (y - exact).abs().max() <= max(1e-6, torch.finfo(dtype).eps) * size, (batch, dtype)


@pytest.mark.parametrize("name", [f"cpu-{isa}" for isa in SETS if isa in ("amx", "vbmi")])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_products_in_whole_numbers_are_off_by_half_a_step_at_most(name, bits):
    for rows, columns in ((192, 576), (300, 1096), (33, 40), (1, 136)):
        codes, residual_codes = random_codes(bits, rows, columns // 8)
        points = decoded(codes, residual_codes, bits).double()
        for batch in (2, 7, 16, 300):
            if batch > LARGEST_DIRECT_BATCH and (name != "cpu-amx" or residual_codes is not None):
                continue  # multiplied as bfloat16
            x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch))
            y = IMPLEMENTATIONS[name].run(e8p_product(codes, residual_codes, bits, torch.bfloat16), x)
            steps = x.abs().amax(1, keepdim=True) / (128 * 64 + 63) / 2 * points.abs().sum(1)
            rounding = 1e-6 * (x.double().abs() @ points.abs().T).amax()
            assert ((y - x.double() @ points.T).abs() <= 1.001 * steps + rounding).all(), (rows, columns, batch)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [1, 2, 16, 128])
@pytest.mark.parametrize("groups", [1, 16, 32])  # at the edge of a block of codes, in one, in a panel
def test_every_code_is_exact(name, batch, groups):
    codes = torch.arange(65536).to(torch.int16).view(-1, groups)
    expected = table("e8p").float().view(len(codes), -1) / 4
    for x in torch.eye(8 * groups).split(batch):
        x_there, codes_there = on_device_of(name, x, codes)
        y = IMPLEMENTATIONS[name].run(e8p_product(codes_there, None, 2, torch.float32), x_there).cpu()
        assert torch.equal(y, x @ expected.T)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_decode_is_exact(name, bits):
    codes, residual_codes = random_codes(bits, 300, 37)
    if bits == 2:
        codes = torch.arange(65536).to(torch.int16).view(256, 256)
    arguments = e8p_arguments(*on_device_of(name, codes, residual_codes), bits)
    chosen = [name.removeprefix("cpu-")] if name != "cuda" else []
    found = operators().decode(*arguments, *chosen).cpu()
    assert torch.equal(found, decoded(codes, residual_codes, bits))


@pytest.fixture
def threads():
    """Sets PyTorch's number of threads; it is as before after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "cuda"])
@pytest.mark.parametrize("batch", [1, 5, LARGEST_DIRECT_BATCH])
def test_same_bytes_on_any_number_of_threads(threads, name, batch):
    # Up to this batch all sums are ours. What is longer goes through the BLAS, which promises no order of its sums.
    codes, residual_codes = random_codes(3, 1037, 192)
    x = torch.randn(batch, 1536)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(IMPLEMENTATIONS[name].run(e8p_product(codes, residual_codes, 3, torch.float32), x))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.skipif("amx" not in SETS, reason="long products are PyTorch's without AMX")
@pytest.mark.parametrize("bits", [1, 2])
def test_same_bytes_of_long_products_in_whole_numbers(threads, bits):
    codes, residual_codes = random_codes(bits, 1037, 192)
    x = torch.randn(300, 1536)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(IMPLEMENTATIONS["cpu-amx"].run(e8p_product(codes, residual_codes, bits, torch.bfloat16), x))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "cuda"])
def test_decoded_bytes_are_the_same_on_any_number_of_threads(threads, name):
    codes, residual_codes = random_codes(3, 1037, 192)
    arguments = e8p_arguments(codes, residual_codes, 3)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(operators().decode(*arguments, name.removeprefix("cpu-")))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("width", [1, 2, 4, 8, 36, 37, 90, 148, 192, 576, 4096, 4864, 11008, 18944])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_transform_agrees_with_float64(threads, isa, width, inverse):
    plan = hadamard.transform_plan(width)
    for count in (1, 5):
        x = torch.randn(count, width, generator=torch.Generator().manual_seed(width))
        exact = hadamard.transform_reference(x.double(), plan, inverse)
        assert torch.allclose(hadamard.transform_reference(x, plan, inverse).double(), exact, atol=1e-5)
        found = []
        for number in (1, 2):
            threads(number)
            found.append(hadamard.transform_compiled(x, plan, inverse, isa))
        assert torch.allclose(found[0].double(), exact, atol=1e-5)
        assert torch.equal(*found)


@needs_kernels
@pytest.mark.parametrize("size", [1, 8, 13, 64])
def test_unpacked_signs_agree(size):
    packed = random_signs(size)
    assert torch.equal(unpack_signs(packed, size), unpack_signs(packed, size, torch.float64).float())


def test_leading_dimensions_and_no_vectors():
    codes, _ = random_codes(2, 24, 5)
    x = torch.randn(2, 3, 40)
    y = product(x, codes, None, 2, torch.float32)
    assert torch.allclose(y, x @ decoded(codes, None, 2).T, atol=1e-4)
    assert product(x[:, :0], codes, None, 2, torch.float32).shape == (2, 0, 24)


def test_gradients_go_through_the_decoded_weight():
    codes, residual_codes = random_codes(3, 24, 5)
    points = decoded(codes, residual_codes, 3)
    x = torch.randn(3, 40, requires_grad=True)
    product(x, codes, residual_codes, 3, torch.float32).sum().backward()
    assert torch.allclose(x.grad, points.sum(0).expand(3, -1))
    transformed = hadamard.transform(x)
    assert transformed.requires_grad
    with torch.no_grad():
        assert product(x, codes, residual_codes, 3, torch.float32).requires_grad is False


@needs_kernels
def test_the_fastest_set_comes_first_and_the_reference_last():
    kernel = e8p_product(random_codes(2, 8, 1)[0], None, 2, torch.float32)
    names = [one.name for one in implementations() if one.can(kernel, torch.zeros(1, 8))]
    assert names == [f"cpu-{isa}" for isa in SETS] + ["reference"]
    assert SETS[-1] == "portable"


@needs_kernels
@pytest.mark.skipif("clang" in os.environ.get("CXX", "c++"), reason="Clang's build is of one thread")
def test_rows_are_shared_among_threads():
    assert operators().threaded() == torch.backends.openmp.is_available()


@pytest.fixture
def without_kernels(monkeypatch):
    """As if quiptools were not installed."""
    cached = (kernels._load, kernels.warn_of_plain_pytorch, implementations)

    def forget():
        for function in cached:
            function.cache_clear()

    monkeypatch.setitem(sys.modules, "quiptools", None)
    forget()
    yield
    monkeypatch.undo()
    forget()


def test_without_kernels_it_works_and_says_so_once(without_kernels):
    codes, _ = random_codes(2, 24, 5)
    x = torch.randn(3, 40)
    with pytest.warns(UserWarning, match="quiptools is not built.*pip install") as said:
        y = [product(x, codes, None, 2, torch.float32) for _ in range(3)][-1]
    assert len(said) == 1
    assert [one.name for one in implementations()] == ["reference"]
    assert torch.allclose(y, Reference().run(e8p_product(codes, None, 2, torch.float32), x))
    assert hadamard.transform(torch.ones(1, 4)).tolist() == [[2, 0, 0, 0]]
    assert unpack_signs(torch.tensor([2], dtype=torch.uint8), 3).tolist() == [1, -1, 1]


@needs_kernels
def test_with_kernels_it_says_nothing():
    codes, _ = random_codes(2, 24, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        product(torch.randn(3, 40), codes, None, 2, torch.float32)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 48)}, "x is a"),
        ({"x": torch.zeros(40)}, "x is a"),
        ({"x": torch.zeros(1, 40, dtype=torch.int32)}, "x is a"),
        ({"codes": torch.zeros(24, 5, dtype=torch.int32)}, "codes are a"),
        ({"codes": torch.zeros(5, 24, dtype=torch.int16).T}, "codes are a"),
        ({"residual": torch.zeros(24, 6, dtype=torch.uint8)}, "residual codes are a"),
        ({"patterns": torch.zeros(128, 8)}, "a table is a"),
        ({"isa": "mmx"}, "does not run the instruction set mmx"),
    ],
)
def test_operators_refuse_what_does_not_fit(change, message):
    codes, _ = random_codes(2, 24, 5)
    names = ("codes", "residual", "patterns", "points", "residual_scale")
    good = dict(zip(names, e8p_arguments(codes, None, 2), strict=True))
    with pytest.raises(ValueError, match=message):
        operators().product(**{"x": torch.zeros(1, 40), **good, "dtype": torch.float32, **change})


@needs_kernels
def test_transform_refuses_what_does_not_fit():
    for x, power in (
        (torch.zeros(1, 8), 4),
        (torch.zeros(8), 8),
        (torch.zeros(1, 8).double(), 8),
        (torch.zeros(1, 6), 6),
    ):
        with pytest.raises(ValueError, match=r"transform takes|factors make up|no power of two"):
            operators().transform(x, [], power)
    with pytest.raises(ValueError, match="uint8 vector"):
        operators().unpack_signs(torch.zeros(1, dtype=torch.uint8), 9)
