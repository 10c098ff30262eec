"""The original model beside the one that is being compressed: what its blocks put out, block by block."""

import torch
from torch import Tensor

from casp.model.capture import capture_inputs
from casp.model.decoder import Decoder
from casp.walk import Visit


class Teacher:
    """Hidden states of an unchanged model, advanced one block at a time, with one block in memory.

    hidden: one tensor per batch, (batch, tokens, hidden), on the CPU: what block `index` - 1 put out.
    """

    def __init__(
        self,
        decoder: Decoder,
        batches: list[dict[str, Tensor]],
        device: torch.device,
        dtype: torch.dtype,
        check: bool = True,
    ) -> None:
        """check: see `capture_inputs`."""
        self.decoder, self.device, self.dtype = decoder, device, dtype
        self.inputs = capture_inputs(decoder, batches, device, dtype, check)
        self.index = 0

    @property
    def hidden(self) -> list[Tensor]:
        """What the last block that was run put out, one tensor per batch."""
        return [batch.hidden for batch in self.inputs]

    def advance_to(self, index: int) -> list[Tensor]:
        """Run the blocks up to and including `index`; returns what that one puts out."""
        while self.index <= index:
            block = self.decoder.load_block(self.index, self.device, self.dtype)
            Visit(self.index, block, self.decoder.linears(self.index), self.inputs, self.device).advance()
            self.decoder.unload_block(self.index)
            self.index += 1
        return self.hidden
