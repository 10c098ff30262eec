"""Weighted error and seconds of the codebooks, state sizes and numbers of sweeps on matrices of a model.

    bash python.sh quip-sharp/experiments/error_against_time.py --model demo-llama --moments DIR --output FILE.json

`--moments` is the output of quip-sharp/scripts/hfize_llama.sh. Errors are `tr(D H D^T) / tr(W H W^T)`, the geometric
mean over the matrices; seconds are CPU time of one thread for all of them.
"""

import argparse
import time
from pathlib import Path

import torch
from casp_quip_sharp.backend import QuipSharp

from casp.cli import Parser, model_folder, run_main
from casp.model.decoder import Decoder
from casp.moments.find import ON_THE_WAY
from casp.moments.store import Moments
from casp.rounding import weighted_error
from casp.run.files import write_json
from casp.seed import matrix_generator

BLOCKS = (0, 3, 12, 25)
SWEEPS = (0, 1, 2, 3, 4)


def problems(model: str, folder: Path, blocks: list[int]) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(path, weight float32, Hessian) of the linears of some blocks, one of each group that shares its input."""
    decoder, moments = Decoder(model_folder(model)), Moments(folder)
    found = []
    for index in blocks:
        block = decoder.load_block(index, torch.device("cpu"), torch.float32)
        known = moments.read(index)
        for path, *_ in known.groups:
            weight = block.get_submodule(path).weight.detach()
            found.append((f"{decoder.blocks[index]}.{path}", weight, known[path].hessian(ON_THE_WAY)))
    return found


def measure(matrices: list, format: dict, sweeps: int, search_scale: bool) -> dict[str, float]:
    """Error and seconds of one setting."""
    backend, logs, seconds = QuipSharp(), [], 0.0
    for path, weight, hessian in matrices:
        begin = time.process_time()
        tensors = backend.quantize(
            weight, hessian, format, matrix_generator(0, path), sweeps=sweeps, search_scale=search_scale, name=path
        )
        seconds += time.process_time() - begin
        module = backend.linear(*weight.shape, False, format)
        module.load_state_dict(tensors)
        logs.append(torch.tensor(weighted_error(weight, module.dequantize(), hessian)).log())
    return {"error": round(torch.stack(logs).mean().exp().item(), 6), "seconds": round(seconds, 2)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(prog="error_against_time.py", description=__doc__.splitlines()[0])
    flags.add_argument("--model", default="demo-llama", help="folder or name (default: %(default)s)")
    flags.add_argument("--moments", type=Path, required=True, help="output of the moments' stage for this model")
    flags.add_argument("--bits", type=int, nargs="+", default=[2], help="bits a weight (default: %(default)s)")
    flags.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, help="blocks (default: %(default)s)")
    flags.add_argument(
        "--states", type=int, nargs="+", default=[8, 10, 12], help="of the trellis (default: %(default)s)"
    )
    flags.add_argument("--sweeps", type=int, nargs="+", default=SWEEPS, help="counts (default: %(default)s)")
    flags.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    return flags


def main(argv: list[str] | None = None) -> None:
    """Measure everything and write it."""
    args = parser().parse_args(argv)
    torch.set_num_threads(1)
    matrices, rows = problems(args.model, args.moments, args.blocks), []
    backend = QuipSharp()
    for bits in args.bits:
        formats = [backend.format(bits)] + [backend.format(bits, False, "trellis", states) for states in args.states]
        for format in formats:
            measure(matrices[:1], format, 1, True)  # compiles and loads what the first use does
            for sweeps in args.sweeps:
                for search_scale in (False, True):
                    row = {**format, "sweeps": sweeps, "search_scale": search_scale}
                    row |= measure(matrices, format, sweeps, search_scale)
                    rows.append(row)
                    print(row, flush=True)
    write_json(args.output, {"model": args.model, "matrices": [path for path, *_ in matrices], "rows": rows})


if __name__ == "__main__":
    run_main(main)
