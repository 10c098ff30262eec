"""CASP: compression of large multimodal models to about 2 bits per weight, based on attention sparsity.

`import casp` is all that transformers needs to load a compressed checkpoint.
"""

from casp.interrupts import tell_in_one_line

tell_in_one_line()  # before the imports that take seconds

from casp import attention, checkpoint  # noqa: E402

attention.register()

__all__ = ["attention", "checkpoint"]
__version__ = "0.1.0"
