"""llama.cpp's product, as speed.sh measures it, against the weights that its blocks stand for."""

import os
from pathlib import Path

import gguf
import pytest
import torch
from casp_eval import ggml

FOLDER = os.environ.get("CASP_GGML")


def test_random_blocks_are_finite_weights_of_their_size():
    blocks = ggml.random_blocks(3, 512)
    weight = torch.from_numpy(gguf.dequantize(blocks.flatten(1).numpy(), gguf.GGMLQuantizationType.IQ2_XXS))
    assert weight.shape == (3, 512)
    assert torch.isfinite(weight).all()
    assert weight.std() > 0
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.IQ2_XXS] == (ggml.BLOCK, ggml.BLOCK_BYTES)
    assert gguf.GGMLQuantizationType.IQ2_XXS == ggml.IQ2_XXS


@pytest.mark.skipif(FOLDER is None, reason="CASP_GGML names no build of ggml")
def test_product():
    blocks = ggml.random_blocks(24, 512)
    x = torch.randint(-127, 128, (3, 512)).float()  # whole numbers up to 127 are what 8 bits hold exactly
    x[:, ::256] = 127
    multiply = ggml.Product(ggml.Library(Path(FOLDER)), blocks, x)
    weight = torch.from_numpy(gguf.dequantize(blocks.flatten(1).numpy(), gguf.GGMLQuantizationType.IQ2_XXS))
    for _ in range(2):
        assert torch.allclose(multiply(), x @ weight.T, rtol=1e-4, atol=1e-2)
