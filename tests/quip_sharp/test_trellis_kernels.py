"""Every implementation of the trellis's product and decoding against float64, from symbols to outputs."""

import pytest
import torch
from casp_quip_sharp.codebook import codebook_of, rates
from casp_quip_sharp.kernels import Product
from casp_quip_sharp.trellis.layout import STRIP, from_storage, to_storage
from casp_quip_sharp.trellis.walks import walk_states

from casp.kernels import implementations, operators, run

IMPLEMENTATIONS = {one.name: one for one in implementations() if one.name != "cuda"}
KERNELS = [name for name in IMPLEMENTATIONS if name != "reference"]
SHAPES = [(256, 64), (512, 260), (300, 30), (264, 12), (33, 40), (37, 7), (1, 5), (16, 16), (8, 3), (1024, 101)]
LARGEST = 128 * 64 + 63  # what an activation is rounded to


def parities(states, masks):
    """Bit i is the parity of each state's bits in masks[i]."""
    numbers = [sum(bin(state & mask).count("1") % 2 << i for i, mask in enumerate(masks)) for state in states.tolist()]
    return torch.tensor(numbers)


def random_matrix(rows, columns, bits, states=8, masks=None, seed=0, mirrored=True):
    """Stored bytes, table, masks and the (rows, columns) float64 weights, found without the code under test."""
    generator = torch.Generator().manual_seed(seed)
    symbols = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    count = 1 << (states if masks is None else masks)
    table = torch.randint(-127, 128, (count,), generator=generator).to(torch.int8)
    number = torch.arange(1 << states)
    picked = None
    if masks is not None:
        if mirrored:
            table[count // 2 :] = -table[: count // 2]
        picked = torch.randint(1, 256, (masks,), generator=generator).to(torch.uint8)
        number = parities(number, picked.tolist())
    walks = torch.cat([walk_states(strip, bits, states) for strip in symbols.split(STRIP)])
    return to_storage(symbols, bits), table, picked, table[number][walks].double() / 64


def product(stored, rows, bits, table, masks, weights, dtype=torch.float32):
    """The kernel of such a matrix."""
    return Product("trellis_product", (stored, rows, bits, table, masks), lambda: weights.float(), dtype)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 6])
@pytest.mark.parametrize(("rows", "columns"), SHAPES, ids=str)
def test_layout_keeps_every_symbol_and_no_bit_more(bits, rows, columns):
    symbols = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    stored = to_storage(symbols, bits)
    assert stored.numel() == -(-rows * columns * bits // 8)
    assert torch.equal(from_storage(stored, rows, columns, bits), symbols)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize(
    ("states", "masks", "mirrored"),
    [(8, 4, True), (8, 5, True), (8, 6, True), (8, 6, False), (8, 8, True), (10, None, False), (12, None, False)],
)
def test_product_agrees_with_float64(name, bits, states, masks, mirrored):
    for rows, columns in SHAPES:
        stored, table, picked, weights = random_matrix(rows, columns, bits, states, masks, rows, mirrored)
        if name != "reference":
            isa = name.removeprefix("cpu-")
            found = operators().trellis_decode(stored, rows, columns, bits, table, picked, isa)
            assert torch.equal(found.double(), weights)
        for batch in (1, 2, 7, 16, 17):
            x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch))
            kernel = product(stored, rows, bits, table, picked, weights)
            y = IMPLEMENTATIONS[name].run(kernel, x)
            # Half a step for each activation, and float32 for what is left.
            steps = x.abs().amax(1, keepdim=True) / LARGEST / 2 * weights.abs().sum(1)
            rounding = 1e-6 * (x.double().abs() @ weights.abs().T).amax()
            assert (y.shape, y.dtype) == ((batch, rows), torch.float32)
            assert ((y - x.double() @ weights.T).abs() <= 1.001 * steps + rounding).all(), (rows, columns, batch)


@pytest.mark.parametrize("bits", [2, 3])
def test_long_products_in_bfloat16(bits):
    stored, table, picked, weights = random_matrix(520, 100, bits, 8, 6)
    x = torch.randn(40, 100)
    exact = x.double() @ weights.T
    for one in IMPLEMENTATIONS.values():
        y = one.run(product(stored, 520, bits, table, picked, weights, torch.bfloat16), x)
        assert (y - exact).abs().max() <= 2**-7 * (x.double().abs() @ weights.abs().T).amax()


def test_the_same_bytes_on_every_set_and_number_of_threads():
    before = torch.get_num_threads()
    try:
        for batch in (1, 5, 16):
            stored, table, picked, weights = random_matrix(700, 1100, 3, 8, 6)
            x = torch.randn(batch, 1100, generator=torch.Generator().manual_seed(1))
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found += [
                    IMPLEMENTATIONS[name].run(product(stored, 700, 3, table, picked, weights), x) for name in KERNELS
                ]
            assert all(torch.equal(one, found[0]) for one in found)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", rates("trellis"))
def test_the_packages_own_tables(bits):
    codebook = codebook_of({"codebook": "trellis", "bits": bits})
    symbols = torch.randint(0, 1 << bits, (264, 36), dtype=torch.uint8)
    stored = codebook.stored([symbols])
    points = codebook.points(stored, 264, 36)
    kernel = codebook.product(stored, 264, 36, torch.float32)
    for batch in (3, 20):
        x = torch.randn(batch, 36)
        bound = 1.01 * x.abs().amax(1, keepdim=True) / LARGEST / 2 * points.abs().sum(1) + 1e-5
        assert ((run(kernel, x) - x @ points.T).abs() <= bound).all()


@pytest.mark.skipif(not KERNELS, reason="quiptools is not built")
def test_what_is_not_finite_stays_so():
    stored, table, picked, weights = random_matrix(32, 8, 2, 8, 5)
    kernel = product(stored, 32, 2, table, picked, weights)
    for value in (float("nan"), float("inf")):
        x = torch.ones(2, 8)
        x[0, 3] = value
        y = run(kernel, x)
        assert not y[0].isfinite().any()
        assert y[1].isfinite().all()
    assert torch.equal(run(kernel, torch.zeros(1, 8)), torch.zeros(1, 32))


@pytest.mark.skipif(not KERNELS, reason="quiptools is not built")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 7}, "1 to 6 bits"),
        ({"codes": torch.zeros(3, dtype=torch.uint8)}, "are 64 bytes"),
        ({"codes": torch.zeros(64, dtype=torch.int8)}, "are 64 bytes"),
        ({"table": torch.zeros(32)}, "int8 vector"),
        ({"table": torch.zeros(16, dtype=torch.int8)}, r"2\^\(their number\)"),
        ({"masks": None}, r"2\^8 to 2\^12"),
        ({"x": torch.zeros(8)}, "matrix of vectors"),
        ({"isa": "mmx"}, "does not run the instruction set mmx"),
    ],
)
def test_operators_refuse_what_does_not_fit(change, message):
    good = {"x": torch.zeros(1, 8), "codes": torch.zeros(64, dtype=torch.uint8), "rows": 32, "rate": 2}
    good |= {"table": torch.zeros(32, dtype=torch.int8), "masks": torch.ones(5, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=message):
        operators().trellis_product(**{**good, "dtype": torch.float32, **change})
