"""QuIP# against GPTQ on the matrices of the built-in models, same weights, same Hessians, the same bytes or fewer.

A class of matrices is a role (q_proj, ..., down_proj); its error is the mean over the blocks looked at. In block 0
alone GPTQ is the lower one in q_proj and k_proj of demo-llava: see the note on it in README.
"""

from collections import defaultdict

import pytest
import torch
from casp_gptq.backend import GPTQ
from casp_quip_sharp.backend import QuipSharp

from casp.data import calibration_batches
from casp.model.capture import capture_inputs
from casp.model.decoder import Decoder
from casp.moments.forward import block_moments
from casp.rounding import weighted_error
from casp.walk import walk

BLOCKS = (0, 3, 12)


def gptq_format(gptq, bits, shape, least):
    """GPTQ's format with the largest groups that takes no fewer than `least` bytes."""
    sizes = (shape[1] // parts for parts in range(1, shape[1]))
    return next(format for size in sizes if gptq.bytes(format := gptq.format(bits, size), *shape) >= least)


def error(backend, format, weight, hessian):
    tensors = backend.quantize(weight, hessian, format, torch.Generator().manual_seed(0), name="weight")
    module = backend.linear(*weight.shape, False, format)
    module.load_state_dict(tensors)
    return weighted_error(weight, module.dequantize().float(), hessian)


SETS = [("demo_llama", "demo-speeches", 24, 4), ("demo_llava", "demo-images", 512, 16)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dataset", "samples", "batch"), SETS)
def test_less_error_on_every_class_of_matrix(request, name, dataset, samples, batch):
    folder = request.getfixturevalue(name)
    decoder = Decoder(folder)
    batches = calibration_batches(folder, dataset, samples, 256, 0, batch)
    inputs = capture_inputs(decoder, batches, torch.device("cpu"), torch.float32)
    quip, gptq = QuipSharp(), GPTQ()
    errors = defaultdict(lambda: [0.0, 0.0])
    for visit in walk(decoder, inputs, torch.device("cpu"), torch.float32):
        if visit.index in BLOCKS:
            groups = visit.input_groups(list(visit.linears.values()))
            for group, hessian in zip(groups, block_moments(visit, groups), strict=True):
                for path in group:
                    weight = visit.block.get_submodule(path).weight.detach().float()
                    for bits in (2, 3, 4):
                        ours = quip.format(bits, tuned=True)
                        theirs = gptq_format(gptq, bits, weight.shape, quip.bytes(ours, *weight.shape))
                        for place, (backend, format) in enumerate(((quip, ours), (gptq, theirs))):
                            errors[bits, path][place] += error(backend, format, weight, hessian)
        if visit.index == max(BLOCKS):
            break
    print(*(f"{bits} {path} {ours / theirs:.3f}" for (bits, path), (ours, theirs) in errors.items()), sep="\n")
    assert not [kind for kind, (ours, theirs) in errors.items() if ours >= theirs]
