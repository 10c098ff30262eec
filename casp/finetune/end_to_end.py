"""End-to-end fine-tuning: the compressed model learns the original model's next-token distribution.

QuIP# (Tseng et al. 2024, arXiv 2402.04396, section 5): sign vectors, scales and norms of the whole quantized model
are trained together. Here the loss is the Kullback-Leibler divergence from the original model's distribution, at the
positions of text; codes never move. The model stays in its packed form: each block decodes its weights when it runs
and, with gradient checkpointing, again when the gradient comes back: one block's dense weights exist at a time.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from casp.backend import Backend
from casp.finetune.in_block import Curve, Lessons, Masters, Training, run_block, train, tunable_tensors
from casp.model.decoder import Decoder
from casp.model.head import POSITIONS, head_logits
from casp.model.inputs import BatchInputs
from casp.ranks import ALONE, Ranks


def final_norms(decoder: Decoder) -> dict[str, Tensor]:
    """The one-dimensional parameters of the language model outside its blocks: its last norm, by the model's names."""
    language = decoder.model.get_decoder()
    inside = set(decoder.block_list.parameters())
    wanted = {parameter for parameter in language.parameters() if parameter.dim() == 1 and parameter not in inside}
    return {name: parameter for name, parameter in decoder.model.named_parameters() if parameter in wanted}


def divergence(decoder: Decoder, hidden: Tensor, target: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Mean over tokens of KL(original || compressed) in nats.

    hidden, target: (tokens, hidden size), the last block's outputs of the compressed and of the original model;
    tensors: as in `head_logits`, for the compressed one. Logits are recomputed for the gradient, a few at a time.
    """

    def part(hidden: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(head_logits(decoder, target).float(), dim=-1)
        found = F.log_softmax(head_logits(decoder, hidden, tensors).float(), dim=-1)
        return F.kl_div(found, wanted, log_target=True, reduction="sum")

    pieces = zip(hidden.split(POSITIONS), target.split(POSITIONS), strict=True)
    return sum(checkpoint(part, h, t, use_reentrant=False) for h, t in pieces) / len(hidden)


def model_tensors(decoder: Decoder, backend: Backend) -> dict[str, Tensor]:
    """What end-to-end fine-tuning may move, by the model's names: every block's tunable tensors and the last norm."""
    found = dict(final_norms(decoder))
    for path, block in zip(decoder.blocks, decoder.block_list, strict=True):
        found |= {f"{path}.{name}": tensor for name, tensor in tunable_tensors(block, backend).items()}
    return found


def distill(
    decoder: Decoder,
    backend: Backend,
    inputs: list[BatchInputs],
    targets: list[Tensor],
    training: Training,
    generator: torch.Generator,
    device: torch.device,
    state: Path,
    checkpointing: bool = True,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, Tensor], Curve]:
    """Train the compressed model, entirely loaded in `decoder`, towards `targets`.

    inputs: what the first block is fed; targets: the original model's last hidden states, one (batch, tokens, hidden)
    per batch. Tokens of pictures and video count as context only. state: file that keeps the training after each epoch
    and from which it resumes; checkpointing: recompute each block for its gradient; ranks: who share out the batches,
    of which `inputs` and `targets` are this rank's. Returns the learned tensors by the model's names, float32, and the
    curve in nats a token.
    """
    masters = Masters(model_tensors(decoder, backend))
    prefixes = [path + "." for path in decoder.blocks]

    def run(index: int, hidden: Tensor, tensors: dict[str, Tensor], batch: BatchInputs) -> Tensor:
        block: nn.Module = decoder.block(index)
        arguments = (block, tensors, batch, index, hidden)
        return checkpoint(run_block, *arguments, use_reentrant=False) if checkpointing else run_block(*arguments)

    def loss(number: int) -> Tensor:
        batch, target, tensors = inputs[number // ranks.size], targets[number // ranks.size], masters.in_use()
        hidden = batch.hidden.to(device)
        for index, prefix in enumerate(prefixes):
            own = {name.removeprefix(prefix): leaf for name, leaf in tensors.items() if name.startswith(prefix)}
            hidden = batch.entering(index + 1, run(index, hidden, own, batch))
        read = batch.text.to(device)
        outside = {name: leaf for name, leaf in tensors.items() if not name.startswith(tuple(prefixes))}
        return divergence(decoder, hidden[read], target.to(device)[read], outside)

    with torch.enable_grad():
        lessons = Lessons(ranks.by_item([int(batch.text.sum()) for batch in inputs]), ranks)
        curve = train(masters, loss, lessons, training, generator, state, progress="end to end")
    return masters.snapshot(), curve
