"""The real models of the paper and its neighbours, from configs alone: what is found, and exact bytes of plans."""

import pytest
from casp_eval.real_models import REAL, empty_checkpoint

from casp.backend import load_backend
from casp.budget import matrices, plan_bytes, uniform_plan
from casp.model.decoder import Decoder


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_real_config_opens_with_exact_bytes(name, tmp_path):
    shape = REAL[name].shape
    decoder = Decoder(empty_checkpoint(REAL[name].config(), tmp_path))
    hidden, inner, depth = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    keys = hidden * shape.get("num_key_value_heads", shape["num_attention_heads"]) // shape["num_attention_heads"]
    block = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    block += [(inner, hidden), (inner, hidden), (hidden, inner)]
    assert len(decoder.blocks) == depth
    assert decoder.share() == 1
    weights = depth * sum(rows * columns for rows, columns in block)
    assert decoder.original_weights() == weights
    shapes = matrices(decoder)
    gptq = load_backend("gptq")
    format = next(one for one in gptq.formats(hidden, hidden) if one["bits"] == 2 and one["group_size"] == 128)
    # 2 bits a code, 2 a zero and 16 a scale for every group of 128: all these widths are multiples of 128 and of 32.
    assert plan_bytes(uniform_plan(decoder, format), shapes, gptq) * 8 == weights * (2 + 18 / 128)
    quip = load_backend("quip-sharp")
    format = next(one for one in quip.formats(hidden, hidden, codebook="e8p") if one["bits"] == 2)
    # 2 bits a code, a sign for every row and column, and a scale of 4 bytes a matrix.
    signs = depth * sum(rows + columns for rows, columns in block)
    assert plan_bytes(uniform_plan(decoder, format), shapes, quip) == weights // 4 + signs // 8 + 4 * len(shapes)
