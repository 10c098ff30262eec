"""Single matrices of a model as people name them: BLOCK.ROLE."""

from collections.abc import Sequence

from torch import Tensor

from casp.errors import UserError
from casp.model.decoder import Decoder


def places(decoder: Decoder, matrices: Sequence[str]) -> dict[str, tuple[int, str]]:
    """BLOCK.ROLE -> block and path; UserError for what the model does not have."""
    every = {
        f"{index}.{role}": (index, path)
        for index in range(len(decoder.blocks))
        for role, path in decoder.linears(index).items()
    }
    for matrix in matrices:
        if matrix not in every:
            raise UserError(f"--matrices {matrix} is no BLOCK.ROLE of {decoder.folder}; an example is 0.q.")
    return {matrix: every[matrix] for matrix in matrices}


def dense_weight(decoder: Decoder, index: int, path: str) -> Tensor:
    """The weight (out, in) float32 of the linear at `path` of block `index`, as the checkpoint holds it."""
    [(_, weight)] = decoder.shards.load([f"{decoder.blocks[index]}.{path}.weight"])
    return weight.float()
