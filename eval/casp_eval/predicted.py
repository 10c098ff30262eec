"""Predicted against measured damage, one matrix at a time: `python -m casp_eval.predicted --model M --costs DIR ...`.

Draws linears and options from a folder of prices, stores each linear in that way for real, alone, and measures the
divergence KL(original || changed) of the next-token distributions on calibration data. Beside the prediction stands
what the paper ranks by, the influence of the block: `s_l N_l 2^(-2 b_l)`.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from casp.backend import Backend, Matrix, load_backend, rounded
from casp.cli import Parser, add_common_arguments, calibration_of, compute_of, model_folder, run_main
from casp.errors import UserError
from casp.factors import quantized_factors
from casp.model.capture import capture_inputs
from casp.model.decoder import Decoder
from casp.model.head import head_logits
from casp.model.inputs import BatchInputs, first_output, moved
from casp.moments.store import LinearMoments, Moments
from casp.numbers import whole
from casp.plan.allocate import frontier
from casp.plan.measure import read_costs
from casp.plan.options import LinearOptions, Option
from casp.run.digest import content_hash
from casp.run.outputs import check_file, read_record, require_writable
from casp.seed import matrix_generator
from casp_eval.correlation import spearman
from casp_eval.options import write_figure

ROWS = 256


class Original:
    """The dense model with the hidden states that enter each block, and those that leave the last.

    Distributions are made of them when they are compared, ROWS at a time: those of all positions at once would take
    as many times the memory of a block's states as the vocabulary is larger than the hidden size.
    """

    def __init__(
        self, decoder: Decoder, batches: list[dict[str, Tensor]], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.decoder, self.device = decoder, device
        self.inputs: list[BatchInputs] = capture_inputs(decoder, batches, device, dtype)
        decoder.load_rest(device, dtype)
        for index in range(len(decoder.blocks)):
            decoder.load_block(index, device, dtype)
        self.places = [batch.predicting for batch in self.inputs]
        self.entering: list[list[Tensor]] = [[batch.hidden for batch in self.inputs]]
        for index in range(len(decoder.blocks)):
            left = [self._block(index, n, hidden) for n, hidden in enumerate(self.entering[-1])]
            self.entering.append([self._entering(index + 1, n, hidden) for n, hidden in enumerate(left)])
        self.leaving = self.entering.pop()

    @torch.no_grad()
    def _block(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        kwargs = moved(self.inputs[batch].kwargs[index], self.device)
        return first_output(self.decoder.block(index)(hidden.to(self.device), **kwargs)).cpu()

    def _entering(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """What enters block `index`, or the norm behind the last one, when `hidden` leaves the block before it."""
        return self.inputs[batch].entering(index, hidden)

    @torch.no_grad()
    def _logs(self, hidden: Tensor) -> Tensor:
        """Logarithms of the distributions, (positions, vocabulary), from what leaves the last block there."""
        return head_logits(self.decoder, hidden.to(self.device)).float().log_softmax(-1)

    def divergence(self, index: int) -> float:
        """Mean KL(original || the model as it now is), block `index` changed, in nats a position."""
        total, count = 0.0, 0
        for n, hidden in enumerate(self.entering[index]):
            for later in range(index, len(self.decoder.blocks)):
                hidden = self._entering(later + 1, n, self._block(later, n, hidden))
            count += int(self.places[n].sum())
            seen = (states[self.places[n]].split(ROWS) for states in (self.leaving[n], hidden))
            for one, other in zip(*seen, strict=True):
                kept, changed = self._logs(one), self._logs(other)
                total += (kept.exp() * (kept - changed)).sum().item()
        if not count:
            raise UserError("the data has no text that text follows; choose another --dataset.")
        if not math.isfinite(total):
            raise UserError(f"block {index}, changed, makes the model predict NaN or infinity; try --dtype float32.")
        return total / count


def stored(
    linear: LinearOptions,
    option: Option,
    weight: Tensor,
    moments: LinearMoments,
    backend: Backend,
    weighting: str,
    seed: int,
) -> Tensor:
    """`weight` as the option stores it, dense, rounded under the moment with these weights of the tokens."""
    hessian = moments.hessian(weighting).to(weight.device)
    if option.rank is None:
        generator = matrix_generator(seed, linear.path)
        ((_, dense),) = rounded(backend, [Matrix(weight, option.formats[0], generator, linear.path)], hessian, {})
        return dense
    gradients = moments.gradient_moment.to(weight.device)
    made = quantized_factors(weight, hessian, gradients, option.rank, option.formats, backend, seed, linear.path, {})
    return made.dense().float()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(prog="python -m casp_eval.predicted", description=__doc__.splitlines()[0])
    add_common_arguments(flags, default_model="demo-llama")
    flags.add_argument("--backend", required=True, help="the quantizer that the prices are of")
    flags.add_argument("--moments", type=Path, required=True, metavar="DIR", help="output of the moments' stage")
    flags.add_argument("--costs", type=Path, required=True, metavar="DIR", help="folder of the priced options")
    flags.add_argument("--token-weights", default="attention+gradient", help="as in the prices (default: %(default)s)")
    flags.add_argument("--draws", type=whole(2), default=60, help="matrices measured, a count (default: 60)")
    return flags


def influence_measure(linear: LinearOptions, option: Option) -> float:
    """What the paper's allocation minimises, of one linear, with bits and weights those of the original.

    Of a low rank the paper's closed form counts those stored instead, which says nothing of what the rank loses and
    would rank the drawn options worse.
    """
    return linear.influence * linear.weights * 4.0 ** (-8 * option.bytes / linear.weights)


def main(arguments: list[str] | None = None) -> None:
    """Draw, change, measure, put back."""
    args = parser().parse_args(arguments)
    decoder = Decoder(model_folder(args.model))
    if args.output is not None:
        inputs = [decoder.folder, args.moments, args.costs, *calibration_of(args).files()]
        check_file(args.output, [{"model", "backend", "spearman", "rows"}], inputs)
        require_writable(args.output)
    compute = compute_of(args).of(decoder.dtype)
    batches = calibration_of(args).batches(decoder.folder, compute.seed)
    moments = Moments(args.moments)
    backend = load_backend(args.backend)
    content, record = content_hash(decoder.folder), read_record(args.costs)
    moments.check(content, decoder, args.token_weights)
    if record is None or record["kind"] != "costs" or record["fingerprint"].get("model") != content:
        raise UserError(f"{args.costs} holds no prices of {args.model}; give the --costs of plan.sh for this model.")
    linears = read_costs(args.costs, decoder, backend)
    original = Original(decoder, batches, compute.device, compute.dtype)
    drawn = random.Random(compute.seed)
    roles = sorted({linear.role for linear in linears})
    rows = []
    for number in tqdm(range(args.draws), desc="measured", dynamic_ncols=True):
        # Roles take turns: by chance alone most draws would be of those that cost alike.
        linear = drawn.choice([linear for linear in linears if linear.role == roles[number % len(roles)]])
        option = drawn.choice(frontier(linear.options))
        path = linear.path.removeprefix(decoder.blocks[linear.block] + ".")
        module = decoder.block(linear.block).get_submodule(path)
        before = module.weight.data
        known = moments.read(linear.block)[path]
        new = stored(linear, option, before.float(), known, backend, args.token_weights, compute.seed)
        module.weight.data = new.to(before)
        rows.append(
            {
                "path": linear.path,
                "rank": option.rank,
                "formats": list(option.formats),
                "bits": 8 * option.bytes / linear.weights,
                "predicted": option.cost,
                "influence": influence_measure(linear, option),
                "measured": original.divergence(linear.block),
            }
        )
        module.weight.data = before
    by_cost, by_influence = (
        spearman([row[key] for row in rows], [row["measured"] for row in rows])["spearman"]
        for key in ("predicted", "influence")
    )
    report = {"model": args.model, "backend": args.backend, "spearman": by_cost, "spearman_influence": by_influence}
    told = ("undefined" if value is None else f"{value:.3f}" for value in (by_cost, by_influence))
    print("Spearman of predicted and measured damage {}; of the block's influence {}".format(*told))
    if args.output is not None:
        write_figure({**report, "rows": rows}, args.output)


if __name__ == "__main__":
    run_main(main)
