"""LDLQ and its sweeps over a block of columns with a trellis: one walk down each strip of rows of each column.

`round_columns` and `descend_columns` are the compiled loops of quiptools on a CPU; the functions `..._reference` beside
them say the same in PyTorch and run elsewhere. QTIP makes a walk of a tile of 16 x 16 weights, so that errors pass
between groups of 16 columns only; down one column every column sees the errors of all later ones.
"""

import torch
from torch import Tensor

from casp.kernels import operators, warn_of_slow_rounding
from casp_quip_sharp.trellis.layout import STRIP
from casp_quip_sharp.trellis.walks import nearest_walks, walk_states


def _strips(column: Tensor) -> list[Tensor]:
    """A column (rows,) as walks side by side: those of full length (STRIP, n), and the shorter last one."""
    whole = len(column) // STRIP * STRIP
    parts = [column[:whole].view(-1, STRIP).T, column[whole:, None]]
    return [part for part in parts if part.numel()]


def nearest_column(column: Tensor, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symbols (rows,) uint8 and points (rows,) float32 of the walks nearest to `column` (rows,)."""
    states = (len(values) - 1).bit_length()
    found = [nearest_walks(part, values, bits) for part in _strips(column)]
    points = [values[walk_states(symbols, bits, states)] for symbols in found]
    return tuple(torch.cat([part.T.flatten() for part in parts]) for parts in (found, points))


def round_columns_reference(
    wanted: Tensor, target: Tensor, feedback: Tensor, values: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Symbols (rows, width) uint8 and points (rows, width) of a block of columns, the last column first.

    wanted, target: (rows, width), with and without the feedback of the blocks that are done; feedback: within the
    block, (width, width); values: of the states.
    """
    error, points = torch.zeros_like(target), torch.empty_like(target)
    symbols = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    for j in range(target.shape[1] - 1, -1, -1):
        column = wanted[:, j] + error[:, j + 1 :] @ feedback[j + 1 :, j]
        symbols[:, j], points[:, j] = nearest_column(column, values, bits)
        error[:, j] = target[:, j] - points[:, j]
    return symbols, points


def descend_columns_reference(
    gradient: Tensor, hessian: Tensor, symbols: Tensor, points: Tensor, values: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """New symbols of a block of columns and how far its points move, (rows, width); the last column first.

    gradient: E H of the block, (rows, width); hessian: (width, width). A walk that would not lower its strip's cost is
    not taken.
    """
    symbols, moves = symbols.clone(), torch.zeros_like(points)
    for j in range(points.shape[1] - 1, -1, -1):
        pull = gradient[:, j] - moves[:, j + 1 :] @ hessian[j + 1 :, j]
        found, candidate = nearest_column(points[:, j] + pull / hessian[j, j], values, bits)
        move = candidate - points[:, j]
        gain = (move * (2 * pull - move * hessian[j, j])).double()
        better = torch.cat([(part.sum() > 0).expand(len(part)) for part in gain.split(STRIP)])
        moves[:, j] = move * better
        symbols[:, j] = torch.where(better, found, symbols[:, j])
    return symbols, moves


def round_columns(wanted: Tensor, target: Tensor, feedback: Tensor, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As `round_columns_reference`; compiled on a CPU."""
    if target.device.type == "cpu" and operators() is not None:
        given = (x.contiguous() for x in (wanted, target, feedback))
        return operators().trellis_round(*given, values, bits, STRIP)
    warn_of_slow_rounding(target.device.type)
    return round_columns_reference(wanted, target, feedback, values, bits)


def descend_columns(
    gradient: Tensor, hessian: Tensor, symbols: Tensor, points: Tensor, values: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """As `descend_columns_reference`; compiled on a CPU."""
    if points.device.type == "cpu" and operators() is not None:
        given = (x.contiguous() for x in (gradient, hessian, symbols, points))
        return operators().trellis_descend(*given, values, bits, STRIP)
    return descend_columns_reference(gradient, hessian, symbols, points, values, bits)
