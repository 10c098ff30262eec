"""The search of `casp_quip_sharp.search` for E8P12 as one compiled loop over vectors, for CPUs."""

import numpy as np
import torch
from torch import Tensor

from casp_quip_sharp.loops import TABLES, nearest_e8p


def nearest_e8p_compiled(vectors: Tensor) -> Tensor:
    """Codes (n,) int16 of the nearest points of E8P12 to `vectors` (n, 8) float32 on the CPU."""
    codes = np.empty(len(vectors), dtype=np.uint16)
    nearest_e8p(vectors.float().contiguous().numpy(), TABLES, codes)
    return torch.from_numpy(codes.view(np.int16))
