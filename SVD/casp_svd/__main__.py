"""Stage 1 of CASP: low-rank W_q and W_k, chosen by what the attention does with them.

Writes a Hugging Face checkpoint whose query and key projections are pairs of factors, in the model's own
dtype; `import casp` and `from_pretrained` open it, and the quantization stages start from it.
Paper: Gholami et al., CASP, CVPR 2025, arXiv 2503.05936.
"""

import argparse
from typing import Any

import torch
from torch import nn

from casp.cli import (
    Parser,
    add_common_arguments,
    base_model,
    calibration_of,
    compute_of,
    default_output,
    model_folder,
    run_main,
    union,
)
from casp.data import fingerprint
from casp.errors import UserError
from casp.linear import LowRankLinear
from casp.lowrank import factor, rank_for
from casp.model.decoder import Decoder
from casp.moments.density import density_batches, influence_and_density
from casp.moments.find import add_moments_argument, find_moments
from casp.moments.store import REMEDY, BlockMoments
from casp.numbers import real
from casp.ranks import here
from casp.run.notes import warnings_of
from casp.run.recipe import COMMAND, earlier_steps
from casp.run.writer import RunFolder
from casp.seed import matrix_generator
from casp.walk import Visit
from casp_svd.options import Factoring
from casp_svd.statistics import Whitening, attention_moments, input_moments


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(prog="python -m casp_svd", description=__doc__.splitlines()[0])
    add_common_arguments(flags, default_model="llava-hf/llava-1.5-7b-hf")
    flags.add_argument(
        "--whitening",
        choices=["none", "input", "attention", "gradient"],
        default="attention",
        help="what an error of a matrix is measured by: none = its entries, input = the layer's own output "
        "(the paper), attention = the output of the attention, gradient = the model's loss, which needs moments "
        "collected before (default: %(default)s)",
    )
    add_moments_argument(flags)
    flags.add_argument(
        "--keep-ratio",
        type=real(0, 1),
        default=0.25,
        help="share of the weights of W_q and W_k to keep, in (0, 1] (default: %(default)s, the paper's)",
    )
    flags.add_argument(
        "--damping",
        type=real(0, 1000, least_too=True),
        default=0.01,
        help="added to the diagonal of each second moment, in units of its mean (default: %(default)s)",
    )
    return flags


def gather_moments(
    visit: Visit, whitening: str, paths: dict[str, str], generator: torch.Generator, known: BlockMoments | None
) -> dict[str, Whitening]:
    """Role ("q", "k") -> what it is whitened by; {} when `whitening` is none, and on ranks that only help rank 0.

    known: moments collected before.
    """
    if whitening == "none":
        return {}
    if whitening == "gradient":
        found = {role: known[paths[role]] for role in "qk"}
        return {role: Whitening(one.hessian("gradient"), one.gradient_moment) for role, one in found.items()}
    if whitening == "input":
        if known is not None:
            return {role: Whitening(known[paths[role]].hessian("none")) for role in "qk"}
        # Of cross-attention each has an input of its own.
        groups = visit.ranks.told(lambda: visit.input_groups([paths["q"], paths["k"]]))
        found = {path: moments for group in groups for moments in [input_moments(visit, group[0])] for path in group}
        return {role: found[paths[role]] for role in "qk"}
    found = attention_moments(visit, paths["q"], paths["k"], paths["o"], generator)
    return {} if found is None else dict(zip("qk", found, strict=True))


def low_rank(
    linear: nn.Linear, rank: int, moments: Whitening | None, damping: float, name: str
) -> tuple[LowRankLinear, float]:
    """`linear` as a LowRankLinear of its dtype and device, and the share of its weighted energy that is lost."""
    weight = linear.weight.detach()
    hessian, output_moment = (moments.hessian, moments.output_moment) if moments else (None, None)
    up, down, singular = factor(weight, rank, hessian, output_moment, damping, name)
    module = LowRankLinear(
        linear.in_features, linear.out_features, rank, linear.bias is not None, weight.dtype, weight.device
    )
    with torch.no_grad():
        module.up.weight.copy_(up)
        module.down.weight.copy_(down)
        if linear.bias is not None:
            module.up.bias.copy_(linear.bias)
    energy = singular.square()
    return module, (energy[rank:].sum() / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)).item()


def attention_blocks(decoder: Decoder) -> list[int]:
    """Numbers of the blocks with linears of their own for queries, keys and the attention's output.

    Blocks without attention (linear attention, say) keep what they have. UserError where no block has them.
    """
    found = [index for index in range(len(decoder.blocks)) if {"q", "k", "o"} <= decoder.linears(index).keys()]
    if not found:
        raise UserError(
            f"no block of model type {decoder.config.model_type!r} has a linear of its own for queries, keys and the "
            "attention's output, so the SVD stage has nothing to factor; quantize the model without it."
        )
    return found


def factored_share(decoder: Decoder, blocks: list[int]) -> float:
    """Share of the decoder's original weights that W_q and W_k of `blocks` are."""
    total = 0
    for index in blocks:
        linears = decoder.linears(index)
        for role in "qk":
            linear = decoder.block(index).get_submodule(linears[role])
            total += linear.in_features * linear.out_features
    return total / decoder.original_weights()


def compress_block(
    visit: Visit,
    name: str,
    factoring: Factoring,
    bits: int,
    generator: torch.Generator,
    known: BlockMoments | None = None,
) -> dict[str, dict[str, Any]]:
    """Factor W_q and W_k of one block in place; role -> {"rank", "bits", "relative_error"} of the factored.

    "notes" besides, a list of sentences, where something was warned of.

    name: the block's path, one of `attention_blocks`; bits: what one stored number takes; known: moments collected
    before. A matrix whose rank would save nothing stays as it is. UserError for one that is compressed already.
    """
    linears = {role: visit.block.get_submodule(visit.linears[role]) for role in ("q", "k")}
    ranks: dict[str, int] = {}
    for role, linear in linears.items():
        if not isinstance(linear, nn.Linear):
            raise UserError(f"{name}.{visit.linears[role]} is compressed already; give the original checkpoint")
        rank = rank_for(factoring.keep_ratio, linear.out_features, linear.in_features)
        if rank is not None:
            ranks[role] = rank
    moments = gather_moments(visit, factoring.whitening, visit.linears, generator, known) if ranks else {}
    report = {}
    for role, rank in ranks.items() if visit.ranks.first else ():  # the others read from the disk what rank 0 made
        path = visit.linears[role]
        with warnings_of("casp") as notes:
            module, error = low_rank(linears[role], rank, moments.get(role), factoring.damping, f"{name}.{path}")
        parent, _, leaf = path.rpartition(".")
        setattr(visit.block.get_submodule(parent), leaf, module)
        kept = rank * (module.in_features + module.out_features) / (module.in_features * module.out_features)
        report[role] = {
            "rank": rank,
            "bits": bits * kept,
            "relative_error": error,
            **({"notes": notes} if notes else {}),
        }
    return report


def main(argv: list[str] | None = None) -> None:
    """Run the stage: block by block, each fed what the compressed blocks before it produce."""
    args = parser().parse_args(argv)
    factoring = Factoring(args.whitening, args.keep_ratio, args.damping)
    calibration, compute = calibration_of(args), compute_of(args)
    decoder = Decoder(model_folder(args.model))
    decoder.require_share(args.allow_partial)
    earlier_steps(decoder.folder)  # what is wrong with a recipe is told now, not when all is done
    factored = attention_blocks(decoder)
    share = factored_share(decoder, factored)
    print(
        f"factoring W_q and W_k of {len(factored)} of {len(decoder.blocks)} blocks: {share:.1%} of the weights in the "
        "decoder's linears"
    )
    compute = compute.of(decoder.dtype)
    needed = {"gradient": "gradient", "input": "none"}.get(factoring.whitening)
    data = union(calibration.record(), calibration.contents(), compute.record())
    moments = find_moments(args.moments, args.model, data, decoder, low_rank=False, weighting=needed)
    if factoring.whitening == "gradient" and moments is None:
        raise UserError(f"--whitening gradient needs moments collected before; run {REMEDY}, or give --moments.")
    batches = None
    if moments is None or factoring.whitening == "attention":
        batches = calibration.batches(decoder.folder, compute.seed)
    settings = union(
        factoring.record(),
        {"share_of_weights": round(share, 4)},
        {} if batches is None else calibration.record(),
        compute.record(),
        {} if moments is None else {"moments": moments.identity(decoder)},
    )
    output = args.output or default_output(args.model, "svd")
    run = RunFolder(
        output,
        decoder,
        "svd",
        base_model(decoder.folder, args.model),
        settings,
        fingerprint(batches or []),
        [*calibration.files(), *([] if moments is None else [moments.folder])],
        here(),
    )
    if run.done:
        print(f"{output} is finished already")
        return
    few = density_batches(calibration.batch_size)
    for visit in run.walk(batches, compute.device, compute.dtype):
        name = decoder.blocks[visit.index]
        known = None if moments is None else moments.read(visit.index)
        influence, density = influence_and_density(visit, few) if known is None else (known.influence, known.density)
        report = {"block_influence": influence, "attention_density": density}
        if visit.index not in factored:
            run.save(visit, report)
            continue
        report["linears"] = compress_block(
            visit,
            name,
            factoring,
            8 * decoder.dtype.itemsize,
            matrix_generator(compute.seed, name),
            known,
        )
        run.save(visit, report)
    run.finish(step={COMMAND: "svd", **args.given})
    print(f"wrote {output} {run.account()}")


if __name__ == "__main__":
    run_main(main, shared=True)
