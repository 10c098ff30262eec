"""The compiled kernels of quantized layers, as operators `torch.ops.quiptools.*` of PyTorch.

Importing this package loads them and registers what tracing and differentiating them takes (`quiptools.graphs`); which
device an operator runs on is decided by its tensors. What they compute is defined by `casp_quip_sharp.kernels` and
`casp_gptq.kernels`, which also hold the references they are tested against.
"""

from importlib.util import find_spec

import torch

from quiptools.graphs import register

torch.ops.load_library(find_spec("quiptools._library").origin)
register()
