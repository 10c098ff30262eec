"""CASP: compression of large multimodal models to about 2 bits per weight, based on attention sparsity.

`import casp` is all that transformers needs to load a compressed checkpoint.
"""

from casp import attention, checkpoint

attention.register()

__all__ = ["attention", "checkpoint"]
__version__ = "0.1.0"
