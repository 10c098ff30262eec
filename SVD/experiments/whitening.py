"""What whitens W_q and W_k best: the measurement behind the default of stage 1, one row per candidate.

python SVD/experiments/whitening.py --model demo-llama --dataset demo-speeches --samples 32 --sequence-length 512 \\
    --batch-size 2 --windows 6

Every candidate factors all blocks of the unchanged model (the statistics of a block are those of the original),
so that one walk serves all. The choice is made on validation text: the rise of the negative log-likelihood in
nats a token, and the divergence KL(original || factored) of the next-token distributions, which varies less.
"""

import json
from collections import defaultdict
from collections.abc import Callable

import torch
from casp_eval.perplexity import text_windows
from casp_svd.statistics import tracked_outputs
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from casp.cli import Parser, add_common_arguments, calibration_of, model_folder, pick_device, run_main
from casp.data.sources import evaluation_text
from casp.lowrank import factor, rank_for
from casp.model.attention import AttentionCall
from casp.model.capture import capture_inputs
from casp.model.decoder import Decoder
from casp.model.inputs import BatchInputs
from casp.moments import SecondMoment
from casp.numbers import count
from casp.walk import Visit, walk

CANDIDATES: dict[str, tuple[str, str | None]] = {
    # name: (weights of the tokens in the input moment, kind of the output moment)
    "input (the paper)": ("equal", None),
    "logits, moments after rotation": ("equal", "rotated"),
    "logits, moments before rotation": ("equal", "plain"),
    "probabilities, tokens equal": ("equal", "softmax"),
    "probabilities, tokens weighted": ("softmax", "softmax"),
    "attention output, tokens equal": ("equal", "output"),
    "attention output, tokens weighted (default)": ("output", "output"),
    "block output, tokens weighted": ("block", "block"),
}


def block_diagonal(heads: list[Tensor]) -> Tensor:
    """One matrix with the heads' moments on its diagonal."""
    return torch.block_diag(*heads)


def exchanged(query: Tensor, key: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor]:
    """Output moments for an error of the logits: the keys' for W_q, those of all its queries for W_k, by head.

    query: (heads * d, heads * d), key: (groups * d, groups * d); each query head shares key head h // (heads /
    groups).
    """
    share, d = heads // groups, query.shape[0] // heads
    of_query = [query[h * d : (h + 1) * d, h * d : (h + 1) * d] for h in range(heads)]
    of_key = [key[g * d : (g + 1) * d, g * d : (g + 1) * d] for g in range(groups)]
    summed = [torch.stack(of_query[g * share : (g + 1) * share]).sum(0) for g in range(groups)]
    return block_diagonal([of_key[h // share] for h in range(heads)]), block_diagonal(summed)


def gather(visit: Visit, decoder: Decoder, seed: int) -> Callable[[str, str], tuple[Tensor, Tensor | None]]:
    """One replay for all candidates; returns (candidate, role) -> (hessian, output moment)."""
    generator = torch.Generator().manual_seed(seed)
    paths = {role: visit.linears[role] for role in "qko"}
    modules = {role: visit.block.get_submodule(path) for role, path in paths.items()}
    hessians: dict[tuple[str, str], SecondMoment] = defaultdict(
        lambda: SecondMoment(modules["q"].in_features, visit.device)
    )
    outputs = {
        (kind, role): SecondMoment(modules[role].out_features, visit.device)
        for kind in ("rotated", "plain", "softmax", "output", "block")
        for role in "qk"
    }
    seen: dict[str, Tensor] = {}

    def note(kind: str, batch: BatchInputs, value: Tensor, cotangent: Tensor | None = None) -> None:
        gradients = torch.autograd.grad(value, leaves, cotangent, retain_graph=kind != "block")
        for role, gradient in zip("qk", gradients, strict=True):
            gradient = gradient[batch.tokens]
            outputs[kind, role].add(gradient)
            hessians[kind, role].add(seen["x"][batch.tokens], gradient.square().sum(-1))

    def enter(x: Tensor, batch: BatchInputs) -> None:
        seen["x"] = x.detach()
        for role in "qk":
            hessians["equal", role].add(x[batch.tokens])

    def attend(call: AttentionCall, batch: BatchInputs) -> None:
        for role, rotated, leaf in zip("qk", (call.query, call.key), leaves, strict=True):
            outputs["rotated", role].add(rotated.transpose(1, 2).flatten(2)[batch.tokens])
            outputs["plain", role].add(leaf[batch.tokens])
        # d/dz of sum sqrt(p) u log p is a sample of the Fisher information of the row p = softmax(z).
        total = torch.zeros((), device=visit.device)
        for head in range(call.query.shape[1]):
            p = call.probabilities(head)
            noise = torch.randn(p.shape, generator=generator).to(p.device) * batch.tokens[:, :, None]
            total = total + (p.detach().sqrt() * noise * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum()
        note("softmax", batch, total)

    def leave(attended: Tensor, batch: BatchInputs) -> None:
        noise = torch.randn((*batch.tokens.shape, decoder.hidden_size), generator=generator).to(visit.device)
        seen["probe"] = noise * batch.tokens[..., None]
        note("output", batch, attended, seen["probe"] @ modules["o"].weight)

    def finish(entered: Tensor, left: Tensor, batch: BatchInputs) -> None:
        note("block", batch, left, seen["probe"])
        torch.set_grad_enabled(False)

    with tracked_outputs([modules["q"], modules["k"]]) as leaves:
        visit.replay({paths["q"]: enter, paths["o"]: leave}, attention=attend, output=finish)

    def moments(candidate: str, role: str) -> tuple[Tensor, Tensor | None]:
        weights, kind = CANDIDATES[candidate]
        hessian = hessians[weights, role].value()
        if kind is None:
            return hessian, None
        if kind in ("rotated", "plain"):
            both = exchanged(
                outputs[kind, "q"].value(), outputs[kind, "k"].value(), decoder.heads, decoder.key_value_heads
            )
            return hessian, both["qk".index(role)]
        moment = outputs[kind, role].value()
        if kind == "softmax":  # heads are independent in the divergence of their rows
            d = decoder.head_dim
            moment = block_diagonal([moment[i : i + d, i : i + d] for i in range(0, len(moment), d)])
        return hessian, moment

    return moments


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Next-token log-probabilities of one window, (tokens, vocabulary)."""
    return model(ids[None]).logits[0].float().log_softmax(-1)


def main(arguments: list[str] | None = None) -> None:
    """Print one line of JSON per candidate."""
    parser = Parser(prog="whitening.py", description=__doc__.splitlines()[0])
    add_common_arguments(parser, default_model="demo-llama")
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="share of weights kept (default: %(default)s)")
    parser.add_argument("--damping", type=float, default=0.01, help="as in the stage (default: %(default)s)")
    parser.add_argument("--windows", type=count, default=6, help="validation windows (default: %(default)s)")
    args = parser.parse_args(arguments)
    device, dtype = pick_device(args.device), torch.float32
    decoder = Decoder(model_folder(args.model))
    batches = calibration_of(args).batches(decoder.folder, args.seed)
    weights: dict[str, dict[str, Tensor]] = {candidate: {} for candidate in CANDIDATES}
    for visit in walk(decoder, capture_inputs(decoder, batches, device, dtype), device, dtype):
        moments = gather(visit, decoder, args.seed)
        for role in "qk":
            path = visit.linears[role]
            weight = visit.block.get_submodule(path).weight
            rank = rank_for(args.keep_ratio, *weight.shape)
            for candidate, found in weights.items():
                if rank is not None:
                    up, down, _ = factor(weight, rank, *moments(candidate, role), args.damping, path)
                    found[f"{decoder.blocks[visit.index]}.{path}.weight"] = (up @ down).to("cpu", dtype)

    model = AutoModelForCausalLM.from_pretrained(decoder.folder, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(decoder.folder)
    length = args.sequence_length
    windows = text_windows(tokenizer, evaluation_text("validation"), length, args.windows).to(device)
    original = [log_probabilities(model, ids) for ids in windows]
    for candidate, found in weights.items():
        model.load_state_dict(found, strict=False)
        rise = divergence = 0.0
        for ids, before in zip(windows, original, strict=True):
            after = log_probabilities(model, ids)
            rise += (F.nll_loss(after[:-1], ids[1:]) - F.nll_loss(before[:-1], ids[1:])).item() / len(windows)
            divergence += F.kl_div(after, before, log_target=True, reduction="batchmean").item() / len(windows)
        print(json.dumps({"candidate": candidate, "nats": round(rise, 4), "divergence": round(divergence, 4)}))


if __name__ == "__main__":
    run_main(main)
