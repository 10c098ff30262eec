"""The contract that a quantizer fulfils, and how the installed quantizers are found."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from casp.errors import UserError
from casp.linear import QuantizedLinear

ENTRY_POINT_GROUP = "casp.backends"

Format = Mapping[str, Any]
"""A JSON description of how one linear is stored; from it and the shape the empty module can be built."""


@dataclass(frozen=True)
class Matrix:
    """One of a group of matrices that share an input, and so its second moment.

    weight: (out, in), any float dtype; generator: of what is random about it, on the CPU; name: what messages call it.
    """

    weight: Tensor
    format: Format
    generator: torch.Generator | None
    name: str


@runtime_checkable
class Backend(Protocol):
    """A quantizer of weight matrices: it knows nothing of models, files or loops.

    A package offers one through the entry-point group `casp.backends`: an object, or a class without
    arguments, that has the attributes below. One that can do the work on a moment once for all matrices which share it
    (q, k and v, or one matrix in several formats) has besides

        quantize_group(matrices: Sequence[Matrix], hessian: Tensor, wanted: Sequence[int], **settings)
            -> Iterator[dict[str, Tensor]]

    whose outcomes are what `quantize` returns for the matrices numbered `wanted`, in that order; of a group of one, to
    the byte. They must not depend on which others are wanted: other processes may make those. One whose errors
    are to each other as the distortions of its formats, where these are small, may say them, so that a plan need not
    try each of them:

        distortion(format: Format, out_features: int, in_features: int) -> float, the mean squared error of a matrix of
            this shape drawn from N(0, 1), at the best scale: more than 0, infinite where it is not known. What a sample
            of rows costs is taken to the whole by the ratio of both
        fine: float, the distortion below which that holds (0.03 where it says nothing)

    And one that fits more to a matrix than its codes, codebooks say, may ask for larger samples than others:

        least_sample: int, weights of a matrix that are rounded to price it, if it has as many
    """

    name: str
    draft: Mapping[str, Any]
    """Settings of `quantize` that are quick and near enough to the usual ones to compare formats by."""

    def formats(self, out_features: int, in_features: int, *, tuned: bool = False, **words: Any) -> list[Format]:
        """Every format that a matrix of this shape may take, in ascending bytes.

        tuned: those only that fine-tuning can move, which may store more; words: the backend's own, which narrow the
        choice or make another (a backend with an attribute `codebooks` takes one of these as `codebook`). A plan
        chooses among them by their bytes and by what `quantize` makes of the matrix; what an entry means is the
        backend's own.
        """

    def bytes(self, format: Format, out_features: int, in_features: int) -> int:
        """Exact bytes of the tensors that `quantize` returns for this shape; a bias is not counted."""

    def quantize(
        self,
        weight: Tensor,
        hessian: Tensor,
        format: Format,
        generator: torch.Generator | None,
        *,
        name: str,
        **settings: Any,
    ) -> dict[str, Tensor]:
        """Quantize `weight` (out, in) float32 under `hessian` = E[x x^T] (in, in).

        Returns the state dict of `linear(...)` without its bias. name: what messages call the matrix;
        `settings` are the backend's own knobs of the search (what the module does not need to be built).
        """

    def linear(
        self,
        out_features: int,
        in_features: int,
        bias: bool,
        format: Format,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> QuantizedLinear:
        """An empty module whose state dict takes what `quantize` returns."""

    def tunable(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of a quantized module that fine-tuning may move, by name."""


def quantized(
    backend: Backend,
    matrices: Sequence[Matrix],
    hessian: Tensor,
    settings: Mapping[str, Any],
    wanted: Sequence[int] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The state dicts of `matrices`, quantized in turn under the moment (in, in) of the input that they share.

    wanted: the numbers of those that are made, ascending; all by default.
    """
    wanted = range(len(matrices)) if wanted is None else wanted
    together = getattr(backend, "quantize_group", None)
    if together is not None:
        yield from together(matrices, hessian, wanted, **settings)
        return
    for one in (matrices[number] for number in wanted):
        weight = one.weight.float()
        yield backend.quantize(weight, hessian, one.format, one.generator, name=one.name, **settings)


def rounded(
    backend: Backend, matrices: Sequence[Matrix], hessian: Tensor, settings: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """As `quantized`: what is stored of each matrix, and the dense float32 (out, in) that it stands for."""
    for one, tensors in zip(matrices, quantized(backend, matrices, hessian, settings), strict=True):
        module = backend.linear(*one.weight.shape, False, one.format, dtype=torch.float32, device=one.weight.device)
        module.load_state_dict(tensors)
        yield tensors, module.dequantize().float()


def backend_names() -> list[str]:
    """Names of the installed backends, sorted."""
    return sorted(entry_points(group=ENTRY_POINT_GROUP).names)


def load_backend(name: str) -> Backend:
    """The installed backend called `name`; UserError if there is none or it does not load."""
    found = entry_points(group=ENTRY_POINT_GROUP, name=name)
    if not found:
        raise UserError(
            f"no backend called {name!r} is installed (found: {', '.join(backend_names()) or 'none'}); install the "
            f"package that offers it in the entry-point group {ENTRY_POINT_GROUP!r}."
        )
    try:
        loaded = next(iter(found)).load()
    except ImportError as error:
        raise UserError(f"backend {name!r} does not import ({error}); reinstall the package it comes from.") from error
    backend = loaded() if isinstance(loaded, type) else loaded
    if not isinstance(backend, Backend):
        raise UserError(
            f"backend {name!r} lacks part of the contract (name, draft, formats, bytes, quantize, linear, tunable); "
            "see casp.backend.Backend."
        )
    return backend
