"""QuIP# against GPTQ on the matrices of the built-in text model, same weights, same Hessians, no more bits.

On chats of demo-llava GPTQ's error is the lower one in most matrices, as it is at 4 bits in one of demo-llama's: see
the note on it in README. There this comparison does not hold, and is not claimed.
"""

import pytest
import torch
from casp_gptq.backend import GPTQ
from casp_quip_sharp.backend import QuipSharp

from casp.calibration import calibration_batches
from casp.hessians import block_moments
from casp.models import Decoder
from casp.quantize import weighted_error
from casp.walk import capture_inputs, walk

BLOCKS = (0, 3)


def errors(backend, format, weight, hessian, **settings):
    tensors = backend.quantize(weight, hessian, format, torch.Generator().manual_seed(0), name="weight", **settings)
    module = backend.linear(*weight.shape, False, format)
    module.load_state_dict(tensors)
    return weighted_error(weight, module.dequantize().float(), hessian)


@pytest.mark.slow
def test_less_error_on_every_class_of_matrix(demo_llama):
    decoder = Decoder.open(demo_llama)
    batches = calibration_batches(demo_llama, "demo", 24, 256, 0, 4)
    inputs = capture_inputs(decoder, batches, torch.device("cpu"), torch.float32)
    quip, gptq = QuipSharp(), GPTQ()
    for visit in walk(decoder, inputs, torch.device("cpu"), torch.float32):
        if visit.index in BLOCKS:
            groups = visit.input_groups(list(visit.linears.values()))
            for group, hessian in zip(groups, block_moments(visit, groups), strict=True):
                for path in group:
                    weight = visit.block.get_submodule(path).weight.detach().float()
                    for bits in (2, 3):
                        theirs = gptq.format(bits, 128)
                        assert quip.bytes({"bits": bits}, *weight.shape) < gptq.bytes(theirs, *weight.shape)
                        ours = errors(quip, {"bits": bits}, weight, hessian)
                        assert ours < errors(gptq, theirs, weight, hessian), (visit.index, path, bits)
        if visit.index == max(BLOCKS):
            break
