"""The compiled kernels of the QuIP# backend, as operators `torch.ops.quiptools.*` of PyTorch.

Importing this package loads them; which device an operator runs on is decided by its tensors. What they compute is
defined by `casp_quip_sharp.kernels`, which also holds the reference they are tested against.
"""

from importlib.util import find_spec

import torch

torch.ops.load_library(find_spec("quiptools._library").origin)
