"""What stage 1 measures of a block: the moments that whiten W_q and W_k."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from casp.model.inputs import BatchInputs
from casp.moments import SecondMoment
from casp.moments.forward import added_up, block_moments
from casp.moments.second_moment import Summands
from casp.walk import Visit


@dataclass
class Whitening:
    """The two moments of one projection.

    hessian: (in, in) of its inputs; output_moment: (out, out) of the directions of its outputs in which an
    error shows, None where errors of all directions count the same; both float64.
    """

    hessian: Tensor
    output_moment: Tensor | None = None


def input_moments(visit: Visit, query: str) -> Whitening:
    """The moment of the input that the query and the key projection share: the whitening of CASP and SVD-LLM."""
    return Whitening(*block_moments(visit, [[query]]))


@contextmanager
def tracked_outputs(projections: list[nn.Module]) -> Iterator[list[Tensor]]:
    """While open, the outputs of `projections` are leaves of a gradient, listed anew in each forward."""
    leaves: list[Tensor] = []

    def follow(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        if module is projections[0]:
            leaves.clear()
        # A replay runs without gradients; they are wanted from here until the attention has been computed.
        torch.set_grad_enabled(True)
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    hooks = [module.register_forward_hook(follow) for module in projections]
    try:
        yield leaves
    finally:
        for hook in hooks:
            hook.remove()


def attention_moments(
    visit: Visit, query: str, key: str, output: str, generator: torch.Generator
) -> tuple[Whitening, Whitening] | None:
    """The moments under which an error of W_q or W_k costs what it changes in the attention's output.

    query, key, output: paths of the projections relative to the block; generator: of the probes, on the CPU. Ranks that
    visit the block together share out the batches; rank 0 gets the moments, the others None.

    To first order an error D of W_q moves the attention's output y_i (after the output projection) by
    ``J_i D x_i`` with ``J_i = dy_i/dq_i``, and costs ``E[x^T D^T J^T J D x]``. A probe u of independent standard
    normals gives ``g_i = d(u . y)/dq_i`` with ``E_u[g_i g_i^T] = J_i^T J_i``: one backward pass through the
    attention samples it without bias, whatever rotary embedding, query/key norm, grouping of heads or mask lies
    between. The same holds for W_k with g_j, the sum over all queries and heads that look at key j; products
    of errors at two different keys are left out.

    The mean of ``(g g^T) (x) (x x^T)`` is split in two factors: the output moment is ``E[g g^T]``, the hessian is
    the mean of ``x x^T`` weighted by ``|g|^2``, so the trace of the product is exact. That weight is the attention
    that a token gets: 0 for a key that no query looks at and for a query whose choice is settled, so image
    tokens that nobody looks at do not enter. Heads are not separated (errors of two heads may cancel in y).
    """
    projections = [visit.block.get_submodule(path) for path in (query, key)]
    project_out = visit.block.get_submodule(output)
    sizes = [size for module in projections for size in (module.in_features, module.out_features)]
    shapes = visit.ranks.by_item([list(batch.tokens.shape) for batch in visit.inputs])
    probes = _probes(shapes, project_out.out_features, generator)

    def see(number: int, one: Visit, moments: Sequence[SecondMoment | Summands]) -> None:
        entered: dict[str, Tensor] = {}
        tokens: dict[str, Tensor] = {}

        def enter(path: str, x: Tensor, batch: BatchInputs) -> None:
            entered[path] = x[batch.tokens]
            tokens[path] = batch.tokens  # of cross-attention the keys are not those of the sequence

        def leave(attended: Tensor, batch: BatchInputs) -> None:
            probe = next(probe for place, probe in probes if place == number).to(attended.device, attended.dtype)
            probe = probe * batch.tokens[..., None]  # an error that only padding sees costs nothing
            seen = torch.autograd.grad(attended, leaves, probe @ project_out.weight)
            torch.set_grad_enabled(False)
            pairs = zip(moments[::2], moments[1::2], strict=True)
            for path, (moment, gradient_moment), gradient in zip((query, key), pairs, seen, strict=True):
                gradient = gradient[tokens[path]].float()
                gradient_moment.add(gradient)
                moment.add(entered[path], gradient.square().sum(-1))

        watched = {path: lambda x, batch, path=path: enter(path, x, batch) for path in (query, key)}
        with tracked_outputs(projections) as leaves:
            one.replay({**watched, output: leave})

    moments = added_up(visit, sizes, see)
    if moments is None:
        return None
    pairs = zip(moments[::2], moments[1::2], strict=True)
    of_query, of_key = (Whitening(moment.value(), gradient.value()) for moment, gradient in pairs)
    return of_query, of_key


def _probes(shapes: Sequence[Sequence[int]], width: int, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """Number and probe (batch, tokens, width) of each batch, one after the other from one generator.

    So also those of other ranks' batches are drawn, and dropped.
    """
    for number, shape in enumerate(shapes):
        yield number, torch.randn(*shape, width, generator=generator)
