"""Second moments of the inputs and of the output gradients of a decoder's linears: their sums, stage, files and reader.

`python -m casp.moments` collects them once for a model; every stage reads them (`store.Moments`).
"""

from casp.moments.cholesky import damped_, damped_cholesky
from casp.moments.second_moment import SecondMoment

__all__ = ["SecondMoment", "damped_", "damped_cholesky"]
