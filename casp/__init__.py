"""CASP: compression of large multimodal models to about 2 bits per weight, based on attention sparsity.

Where CASP is installed transformers loads compressed checkpoints; `import casp` is for `casp.compress`, which makes
them.
"""

from casp.interrupts import tell_in_one_line

tell_in_one_line()  # before the imports that take seconds

from casp.api import Calibration, compress  # noqa: E402
from casp.model import attention, checkpoint  # noqa: E402

attention.register()

__all__ = ["Calibration", "attention", "checkpoint", "compress"]
__version__ = "0.1.0"
