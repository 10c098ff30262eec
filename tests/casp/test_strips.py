"""Rows in strips: they cover a matrix once, stay bounded, and change nothing of what is rounded."""

import casp_gptq.gptq as gptq
import casp_quip_sharp.quantize as quip_sharp
import pytest
import torch
from casp_gptq.gptq import gptq_quantize
from hypothesis import given
from hypothesis import strategies as st

from casp.backend import load_backend
from casp.strips import row_strips


@given(st.integers(1, 100_000), st.integers(1, 40_000), st.integers(1, 2**27))
def test_strips_cover_all_rows_and_stay_bounded(rows, columns, largest):
    strips = list(row_strips(rows, columns, largest))
    assert [strip.start for strip in strips] == [0, *(strip.stop for strip in strips[:-1])]
    assert strips[-1].stop == rows
    height = strips[0].stop
    assert height <= 256 or height * columns <= largest
    assert all(strip.stop - strip.start == height for strip in strips[:-1])
    assert len(strips) == 1 or height % 256 == 0
    if rows * columns <= largest:
        assert len(strips) == 1


def in_small_strips(monkeypatch, module):
    cut = []

    def strips(rows, columns):
        found = list(row_strips(rows, columns, 256 * columns))
        cut.append(len(found))
        return found

    monkeypatch.setattr(module, "row_strips", strips)
    return cut


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_makes_the_same_of_a_matrix_in_strips(monkeypatch, correlated, act_order):
    weight, hessian = correlated(600, 96)
    whole = gptq_quantize(weight, hessian, 3, 32, act_order=act_order)
    cut = in_small_strips(monkeypatch, gptq)
    parts = gptq_quantize(weight, hessian, 3, 32, act_order=act_order)
    assert cut == [3]
    same = (whole.codes == parts.codes).double().mean()
    assert same > 0.999  # a product of fewer rows may round its last bit otherwise
    assert torch.equal(whole.zeros, parts.zeros)
    torch.testing.assert_close(whole.scales, parts.scales, rtol=2e-3, atol=0)


@pytest.mark.parametrize("codebook", ["trellis", "e8p"])
def test_quip_sharp_makes_the_same_of_a_matrix_in_strips(monkeypatch, correlated, codebook):
    weight, hessian = correlated(600, 96)
    backend = load_backend("quip-sharp")
    format = backend.format(2, codebook=codebook)

    def dense():
        linear = backend.linear(600, 96, False, format)
        linear.load_state_dict(backend.quantize(weight, hessian, format, torch.Generator().manual_seed(0)))
        return linear.dequantize()

    whole = dense()
    cut = in_small_strips(monkeypatch, quip_sharp)
    parts = dense()
    assert cut[0] == 3
    assert (whole - parts).norm() < 0.02 * whole.norm()
