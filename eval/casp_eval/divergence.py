"""How far a checkpoint's next-token distributions are from its original's: `python -m casp_eval.divergence ...`.

Mean KL(original || checkpoint) in nats over the positions that hold text and are followed by text, on samples that are
drawn as calibration draws them. Give a seed that calibration did not have: the samples are then others.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from casp.cli import Parser, add_calibration_arguments, add_device_arguments, calibration_of, run_main
from casp.errors import UserError
from casp.model.batch import predicting
from casp.model.modality import visual_tokens
from casp.numbers import seed
from casp.ranks import ALONE, Ranks, here
from casp_eval.loading import Checkpoint, open_checkpoint
from casp_eval.options import add_model_argument, add_output_argument, check_output, write_figure


def positions(batch: dict[str, Tensor], config: Any) -> Tensor:
    """(batch, tokens) bool: where text stands that text follows, questions and answers alike."""
    ids, visual = batch["input_ids"], visual_tokens(batch["input_ids"], config)
    mask = batch.get("attention_mask")
    text = ~visual["image"] & ~visual["video"] & (torch.ones_like(ids) if mask is None else mask).bool()
    return predicting(text)


def require_same_tokens(original: Checkpoint, other: Checkpoint) -> None:
    """UserError where the two do not give the same ids to the same words: a divergence would compare other tokens."""
    sizes = [one.config.get_text_config().vocab_size for one in (original, other)]
    if sizes[0] != sizes[1] or original.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise UserError(
            f"{other.folder} has other tokens than {original.folder}; give what it was made from as --original."
        )


@torch.inference_mode()
def divergence(
    original: Checkpoint, other: Checkpoint, batches: list[dict[str, Tensor]], ranks: Ranks = ALONE
) -> tuple[float, int]:
    """Mean KL(original || other) in nats over `positions`, and how many they are. UserError where it is not finite.

    ranks: who share out the batches.
    """
    mine = []
    for number in tqdm(ranks.mine(len(batches)), desc="divergence", dynamic_ncols=True):
        batch = batches[number]
        read = positions(batch, original.config)
        logs = []
        for checkpoint in (original, other):
            given = {
                name: value.to(checkpoint.device, checkpoint.model.dtype if value.is_floating_point() else None)
                for name, value in batch.items()
            }
            with checkpoint.running():
                seen = checkpoint.model(**given, use_cache=False).logits[read.to(checkpoint.device)]
            logs.append(seen.float().log_softmax(-1))
        lost = functional.kl_div(logs[1], logs[0], log_target=True, reduction="sum").item()
        mine.append([lost, int(read.sum())])
    found = ranks.by_item(mine)
    count = sum(positions for _, positions in found)
    if not count:
        raise UserError("the data has no text that text follows; choose another --dataset.")
    mean = sum(lost for lost, _ in found) / count
    if mean != mean or mean == float("inf"):
        raise UserError(f"{other.folder} predicts NaN or infinity: its weights or scales are damaged, make it again")
    return mean, count


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="divergence.sh", description="Divergence of a checkpoint from its original, as JSON.")
    add_model_argument(parser)
    parser.add_argument("--original", required=True, help="what --model was made from, as in --model")
    add_output_argument(parser)
    add_device_arguments(parser)
    add_calibration_arguments(parser)
    parser.add_argument(
        "--seed", type=seed, default=1000, help="draws the samples; not the calibration's (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    check_output(options.output, options.model, options.original, *calibration_of(options).files())
    calibration, compute = calibration_of(options), (options.device, options.dtype)
    original, other = open_checkpoint(options.original, *compute), open_checkpoint(options.model, *compute)
    require_same_tokens(original, other)
    found, count = divergence(original, other, calibration.batches(original.folder, options.seed), here())
    figure = {"model": options.model, "original": options.original, "seed": options.seed, **calibration.record()}
    if here().first:
        write_figure({**figure, "divergence": found, "positions": count}, options.output)


if __name__ == "__main__":
    run_main(main, shared=True)
