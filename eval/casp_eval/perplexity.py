"""Text perplexity on non-overlapping windows: `python -m casp_eval.perplexity --model ... --dataset ...`.

Perplexity = exp of the mean negative log-likelihood of the next token. The text is tokenized once, without
special tokens, and cut into windows that do not overlap; in each, every token but the first is predicted from
those before it in that window. This is the protocol of the GPTQ paper (arXiv 2210.17323) and of those after it;
the defaults here (64 windows of 512 tokens) are smaller than theirs (all windows of 2048).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from casp.cli import Parser, add_device_arguments, run_main
from casp.data.sources import EVALUATION_TEXTS, evaluation_text
from casp.errors import UserError
from casp.ranks import ALONE, Ranks, here
from casp.reading.pretrained import check_ids
from casp_eval.loading import Checkpoint, open_checkpoint
from casp_eval.options import (
    add_batch_argument,
    add_model_argument,
    add_output_argument,
    add_text_arguments,
    check_output,
    write_figure,
)
from casp_eval.scoring import token_losses


def text_windows(tokenizer: Any, text: str, length: int, count: int) -> Tensor:
    """The first `count` windows of `length` tokens (0 = all that fit): int64 (windows, length), no BOS.

    UserError when the text is too short for one window.
    """
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    fit = len(ids) // length
    if fit == 0:
        raise UserError(
            f"the text has {len(ids)} tokens, too few for one window of {length}: "
            "give a longer text or a smaller --sequence-length"
        )
    windows = min(fit, count) if count else fit
    return ids[: windows * length].view(windows, length)


def mean_loss(
    model: nn.Module, windows: Tensor, batch_size: int, progress: str | None = None, ranks: Ranks = ALONE
) -> float:
    """Mean negative log-likelihood, in nats a token, of every token but the first of each window.

    windows: token ids (windows, length). progress: a label for the bar, None for no bar; ranks: who share out the
    batches.
    """
    device = next(model.parameters()).device
    batches, mine = windows.split(batch_size), []
    for number in tqdm(ranks.mine(len(batches)), desc=progress, disable=progress is None, leave=False):
        ids = batches[number].to(device)
        keep = torch.ones_like(ids, dtype=torch.bool)
        keep[:, -1] = False
        losses = token_losses(model, {"input_ids": ids}, ids.roll(-1, dims=1), keep)
        mine.append([losses.double().sum().item(), losses.numel()])
    found = ranks.by_item(mine)
    return sum(loss for loss, _ in found) / sum(tokens for _, tokens in found)


def perplexity(loss: float, of: str) -> float:
    """exp(loss); `of` names the checkpoint. UserError for NaN; the largest float where exp would overflow."""
    if not math.isfinite(loss):
        raise UserError(f"{of} predicts NaN or infinity: its weights or scales are damaged, make it again")
    return math.exp(min(loss, 709.0))  # exp(710) has no float; a model that bad may still appear in a table


def text_perplexity(
    checkpoint: Checkpoint,
    text: str,
    length: int,
    count: int,
    batch_size: int,
    progress: str | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """{"perplexity", "windows", "sequence_length", "tokens"} of a text; see the module for the protocol."""
    windows = text_windows(checkpoint.tokenizer, text, length, count)
    check_ids(windows, checkpoint.config, checkpoint.folder)
    with checkpoint.running():
        loss = mean_loss(checkpoint.model, windows, batch_size, progress, ranks)
    return {
        "perplexity": perplexity(loss, str(checkpoint.folder)),
        "windows": len(windows),
        "sequence_length": length,
        "tokens": len(windows) * (length - 1),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="perplexity.sh", description="Text perplexity of a checkpoint, as JSON.")
    add_model_argument(parser)
    add_output_argument(parser)
    add_device_arguments(parser)
    parser.add_argument(
        "--dataset",
        default="test",
        help=f"text: {', '.join(EVALUATION_TEXTS)} (the last three from the hub), or a .txt or .jsonl file "
        "(default: %(default)s)",
    )
    add_text_arguments(parser)
    add_batch_argument(parser)
    options = parser.parse_args(arguments)
    check_output(options.output, options.model, options.dataset)
    text = evaluation_text(options.dataset)
    checkpoint = open_checkpoint(options.model, options.device, options.dtype)
    figure = text_perplexity(
        checkpoint, text, options.sequence_length, options.windows, options.batch_size, progress="text", ranks=here()
    )
    if here().first:
        write_figure({"model": options.model, "dataset": options.dataset, **figure}, options.output)


if __name__ == "__main__":
    run_main(main, shared=True)
