"""What PyTorch must know of the operators to trace and to differentiate them: shapes without data, gradients in x.

An operator is differentiable in the vectors that it multiplies, and in nothing else: their gradient goes back through
the decoded matrix and the transposed transforms, by operators too. Asking for another gradient is an error.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

GROUP = 8  # columns to an E8 code
_ops = torch.ops.quiptools
Inputs = tuple[Any, ...]


def _width(factors: Sequence[Tensor], power: int) -> int:
    return power * prod(len(factor) for factor in factors)


def _rows(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows), dtype=dtype)


def _decoded(codes: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix that lies column by column on a CPU."""
    if codes.is_cuda:
        return codes.new_empty((rows, columns), dtype=torch.float32)
    return codes.new_empty((columns, rows), dtype=torch.float32).t()


def _trellis_layer(x: Tensor, *rest: Any) -> Tensor:
    out_factors, out_power = rest[8:10]
    return _rows(x, _width(out_factors, out_power), x.dtype)


# Operator -> the outputs that its inputs, in the order of its schema, have.
SHAPES: dict[str, Callable[..., Any]] = {
    "unpack_signs": lambda packed, size: packed.new_empty(size, dtype=torch.float32),
    "transform": lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
    "decode": lambda codes, *rest: codes.new_empty((len(codes), GROUP * codes.shape[1]), dtype=torch.float32),
    "product": lambda x, codes, *rest: _rows(x, len(codes), torch.float32),
    "layer": lambda x, codes, *rest: _rows(x, len(codes), x.dtype),
    "trellis_decode": lambda codes, rows, columns, *rest: _decoded(codes, rows, columns),
    "trellis_product": lambda x, codes, rows, *rest: _rows(x, rows, torch.float32),
    "trellis_layer": _trellis_layer,
    "trellis_round": lambda wanted, *rest: (torch.empty_like(wanted, dtype=torch.uint8), torch.empty_like(wanted)),
    "trellis_descend": lambda gradient, hessian, symbols, *rest: (
        torch.empty_like(symbols),
        torch.empty_like(gradient),
    ),
    "gptq_decode": lambda words, zeros, scales, columns, *rest: _decoded(words, words.shape[1], columns),
    "gptq_layer": lambda x, words, *rest: _rows(x, words.shape[1], x.dtype),
    "aqlm_decode": lambda codes, codebooks, scales, columns, *rest: scales.new_empty(
        (len(codes), columns), dtype=torch.float32
    ),
    "aqlm_nearest_pairs": lambda targets, *rest: targets.new_empty((len(targets), 2), dtype=torch.int64),
    "aqlm_layer": lambda x, codes, *rest: _rows(x, len(codes), x.dtype),
}


def _through(gradient: Tensor, matrix: Tensor, half: bool) -> Tensor:
    """`gradient matrix` in float32, of factors in bfloat16 where the forward may have rounded to them."""
    if half and gradient.dtype == torch.bfloat16:
        return (gradient @ matrix.to(torch.bfloat16)).float()
    return gradient.float() @ matrix


def _transposed(x: Tensor, factors: Sequence[Tensor], power: int) -> Tensor:
    return _ops.transform(x.contiguous(), [factor.t().contiguous() for factor in factors], power)


def _vector(vector: Tensor, width: int) -> Tensor:
    return _ops.unpack_signs(vector, width) if vector.dtype == torch.uint8 else vector.float()


def _through_layer(gradient: Tensor, columns: int, matrix: Tensor, sides: Inputs) -> Tensor:
    """The gradient of a layer's x, which has so many columns; sides: the operator's inputs from in_vector on."""
    in_vector, in_factors, in_power, out_vector, out_factors, out_power, scale, _, half, *_ = sides
    g = gradient.reshape(-1, gradient.shape[-1]).float() * _vector(out_vector, gradient.shape[-1])
    g = _transposed(g if scale is None else g * scale.float(), out_factors, out_power).to(gradient.dtype)
    g = _transposed(_through(g, matrix, half), in_factors, in_power)
    g = g * _vector(in_vector, g.shape[-1])
    return g[:, :columns].reshape(*gradient.shape[:-1], columns)


def _of_layer(gradient: Tensor, columns: int, rest: Inputs) -> Tensor:
    return _through_layer(gradient, columns, _ops.decode(*rest[:5]), rest[5:])


def _of_trellis_layer(gradient: Tensor, columns: int, rest: Inputs) -> Tensor:
    codes, *coding = rest[:4]
    _, in_factors, in_power, _, out_factors, out_power, *_ = sides = rest[4:]
    sizes = _width(out_factors, out_power), _width(in_factors, in_power)
    return _through_layer(gradient, columns, _ops.trellis_decode(codes, *sizes, *coding), sides)


def _of_trellis_product(gradient: Tensor, columns: int, rest: Inputs) -> Tensor:
    codes, rows, *coding = rest[:5]
    return gradient @ _ops.trellis_decode(codes, rows, columns, *coding)


def _of_gptq_layer(gradient: Tensor, columns: int, rest: Inputs) -> Tensor:
    *matrix, bits, group_size, _, half = rest[:7]
    return _through(gradient, _ops.gptq_decode(*matrix, columns, bits, group_size), half)


def _of_aqlm_layer(gradient: Tensor, columns: int, rest: Inputs) -> Tensor:
    *matrix, bits, _, half = rest[:6]
    return _through(gradient, _ops.aqlm_decode(*matrix, columns, bits), half)


# Operator -> the gradient of x, given the output's, x's columns and the other inputs in the order of the schema.
GRADIENTS: dict[str, Callable[[Tensor, int, Inputs], Tensor]] = {
    "transform": lambda gradient, columns, rest: _transposed(gradient, *rest[:2]),
    "product": lambda gradient, columns, rest: gradient @ _ops.decode(*rest[:5]),
    "layer": _of_layer,
    "trellis_product": _of_trellis_product,
    "trellis_layer": _of_trellis_layer,
    "gptq_layer": _of_gptq_layer,
    "aqlm_layer": _of_aqlm_layer,
}


def _register(name: str, gradient_of: Callable[[Tensor, int, Inputs], Tensor]) -> None:
    def setup_context(ctx: Any, inputs: Inputs, output: Tensor) -> None:
        x, *rest = inputs
        if any(ctx.needs_input_grad[1:]):
            raise RuntimeError(f"quiptools::{name} is differentiable in x alone; train the rest by the plain version")
        ctx.columns, ctx.dtype, ctx.rest = x.shape[-1], x.dtype, tuple(rest)

    def backward(ctx: Any, gradient: Tensor) -> Inputs:
        found = gradient_of(gradient, ctx.columns, ctx.rest).to(ctx.dtype)
        return found, *([None] * len(one) if isinstance(one, list | tuple) else None for one in ctx.rest)

    torch.library.register_autograd(f"quiptools::{name}", backward, setup_context=setup_context)


def register() -> None:
    """Tell PyTorch, once in a process, after the operators were loaded."""
    for name, shapes in SHAPES.items():
        torch.library.register_fake(f"quiptools::{name}", shapes)
    for name, gradient_of in GRADIENTS.items():
        _register(name, gradient_of)
