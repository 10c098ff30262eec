"""What a plan's prices say of a backend's formats, beside what rounding the whole matrix as usual costs: JSON.

`bash eval/scripts/prices.sh --backend aqlm --model demo-llama --moments DIR --output FILE.json`
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from casp.backend import Backend, Matrix, backend_names, load_backend, rounded
from casp.cli import Parser, model_folder, run_main
from casp.cli.matrices import dense_weight, places
from casp.model.decoder import Decoder
from casp.moments.store import Moments
from casp.plan.costs import Pricing, key
from casp.plan.factors import Extent, Sample, sample_of, under
from casp.run.digest import content_hash
from casp.run.files import write_json
from casp.run.outputs import check_file, require_writable
from casp.seed import matrix_generator

FEW = 64
"""Rows that tell enough of a backend without codebooks."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(prog="prices.sh", description=__doc__.splitlines()[0])
    flags.add_argument("--backend", choices=backend_names(), required=True, help="quantizer")
    flags.add_argument("--model", default="demo-llama", help="hub id, folder or built-in name (default: %(default)s)")
    flags.add_argument("--moments", type=Path, required=True, metavar="DIR", help="output of the moments' stage")
    flags.add_argument("--matrices", nargs="+", default=["3.q", "10.v", "10.o", "20.gate"], help="BLOCK.ROLE ...")
    flags.add_argument("--output", type=Path, required=True, help="JSON file to write")
    return flags


def compare(backend: Backend, weight: Tensor, hessian: Tensor, name: str) -> list[dict[str, Any]]:
    """For each format of `weight` (out, in) under `hessian` its cost, and what three ways of pricing make of it.

    cost: of the whole matrix, the usual search, relative to the energy of the outputs; the others as shares of it: from
    FEW rows, from as many as a plan takes, and what the plan tells, by distortions where it does not try.
    """
    pricing = Pricing(backend, low_rank=frozenset())

    def cost(sample: Sample, format: dict[str, Any], settings: dict[str, Any]) -> float:
        matrix = Matrix(sample.weight, format, matrix_generator(0, name), name)
        [(_, dense)] = rounded(backend, [matrix], hessian, settings)
        return sample.cost(dense)

    square = under(hessian)
    few, some, every = (
        sample_of(weight, extent, square, 1.0, name) for extent in (Extent(FEW), pricing.extent, Extent(len(weight)))
    )
    [told] = pricing.costs([some], hessian)
    energy, found = max(every.cost(torch.zeros_like(weight)), sys.float_info.min), []
    for format in pricing.formats(tuple(weight.shape)):
        whole = max(cost(every, format, {}), sys.float_info.min)
        row = {"format": format, "cost": whole / energy, "few_rows": cost(few, format, dict(backend.draft)) / whole}
        found.append(row | {"rows_of_a_plan": cost(some, format, dict(backend.draft)) / whole})
        found[-1]["told"] = told[key(format)] / whole
    return found


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Compare on every matrix asked for; the file is complete after each."""
    args = parser().parse_args(argv)
    decoder, moments = Decoder(model_folder(args.model)), Moments(args.moments)
    backend = load_backend(args.backend)
    weighting = Pricing(backend).weighting
    moments.check(content_hash(decoder.folder), decoder, weighting)
    wanted = places(decoder, args.matrices)
    check_file(args.output, [{"prices"}], [decoder.folder, args.moments])
    require_writable(args.output)
    results: list[dict[str, Any]] = []
    for matrix, (index, path) in wanted.items():
        weight = dense_weight(decoder, index, path)
        hessian = moments.read(index)[path].hessian(weighting, sized_as="gradient").float()
        rows = compare(backend, weight, hessian, matrix)
        results.append({"matrix": matrix, "shape": list(weight.shape), "formats": rows})
        write_json(args.output, {"prices": results})
        for row in rows:
            print(
                f"{matrix} {key(row['format'])}: {row['cost']:.5f}, of it {row['few_rows']:.2f} from {FEW} rows, "
                f"{row['rows_of_a_plan']:.2f} from a plan's, {row['told']:.2f} told"
            )


if __name__ == "__main__":
    run_main(main)
