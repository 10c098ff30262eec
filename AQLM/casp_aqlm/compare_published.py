"""Loss against time of this room's search and of the published algorithm, on matrices of a model: JSON and a plot.

`python -m casp_aqlm.compare_published --model demo-llama --moments DIR --output FILE.json`

Time is the processor's, which other work on the machine hardly lengthens: on one thread, that of a quiet machine.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from casp.cli import Parser, model_folder, run_main
from casp.cli.matrices import dense_weight, places
from casp.errors import UserError
from casp.model.decoder import Decoder
from casp.moments.find import ON_THE_WAY
from casp.moments.store import Moments
from casp.numbers import real
from casp.numbers import seed as any_seed
from casp.reading.files import is_there
from casp.run.digest import content_hash
from casp.run.files import write_json
from casp.run.outputs import check_file, refuse_inputs, require_writable
from casp.seed import matrix_generator
from casp_aqlm.factors import Factors
from casp_aqlm.loss_plot import draw
from casp_aqlm.published import published_aqlm
from casp_aqlm.quantize import quantize_additive
from casp_aqlm.scheme import Scheme


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(prog="python -m casp_aqlm.compare_published", description=__doc__.splitlines()[0])
    flags.add_argument("--model", default="demo-llama", help="hub id, folder or built-in name (default: %(default)s)")
    flags.add_argument("--moments", type=Path, required=True, metavar="DIR", help="output of the moments' stage")
    flags.add_argument("--matrices", nargs="+", default=["3.q", "3.v", "10.gate", "10.down"], help="BLOCK.ROLE ...")
    flags.add_argument("--scheme", default="2x8g8", help="MxBgG (default: %(default)s)")
    flags.add_argument(
        "--seconds",
        type=real(0, 10**6),
        default=600,
        help="after which the published one is stopped (default: %(default)s)",
    )
    flags.add_argument("--seed", type=any_seed, default=0, help="of what codebooks start from (default: %(default)s)")
    flags.add_argument("--output", type=Path, required=True, help="JSON file to write, a .png beside it")
    return flags


def read(
    decoder: Decoder, moments: Moments, index: int, path: str, scheme: Scheme, matrix: str
) -> tuple[Tensor, Tensor]:
    """Weight and damped Hessian of a linear, called `matrix`, padded to whole groups."""
    found = moments.read(index)[path].hessian(ON_THE_WAY)
    weight = dense_weight(decoder, index, path)
    extra = scheme.padded(weight.shape[1]) - weight.shape[1]
    hessian = Factors.of(F.pad(found.double(), (0, extra, 0, extra)), scheme.group, 0.01, matrix).hessian
    return F.pad(weight, (0, extra)), hessian


def compare(weight: Tensor, hessian: Tensor, scheme: Scheme, seed: int, name: str, seconds: float) -> dict[str, Any]:
    """Both histories, [seconds, relative loss] each, and how long ours took to reach the other's last loss."""
    clock = time.process_time
    ours = quantize_additive(
        weight, hessian, scheme, matrix_generator(seed, name), damping=1e-6, clock=clock, name=name
    )
    theirs = published_aqlm(weight, hessian, scheme, matrix_generator(seed, name), seconds=seconds, clock=clock)
    took, loss = theirs.history[-1]
    reached = next((at for at, value in ours.history if value <= loss), None)
    return {
        "matrix": name,
        "shape": list(weight.shape),
        "ours": ours.history,
        "published": theirs.history,
        "published_ended_itself": took <= seconds,
        "seconds_to_its_loss": reached,
        "times_faster": None if reached is None else took / reached,
    }


def picture_of(output: Path) -> Path:
    """Where the figure goes, beside the JSON."""
    return output.with_suffix(".png")


def check_place(output: Path, inputs: Sequence[Path]) -> None:
    """UserError, before anything is measured, where figure or JSON would replace what this script did not make."""
    check_file(output, [{"scheme", "matrices"}], inputs)
    picture = picture_of(output)
    if picture == output or (is_there(picture) and not output.exists()):
        raise UserError(f"{picture}, where the figure would go, is --output itself or was there; choose another one.")
    refuse_inputs(picture, inputs)
    require_writable(output)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Compare on every matrix asked for; the file is complete after each."""
    args = parser().parse_args(argv)
    scheme, decoder, moments = (
        Scheme.parse(args.scheme),
        Decoder(model_folder(args.model)),
        Moments(args.moments),
    )
    moments.check(content_hash(decoder.folder), decoder, ON_THE_WAY)
    wanted = places(decoder, args.matrices)
    check_place(args.output, [decoder.folder, args.moments])
    warm = torch.randn(32, 4 * scheme.group, generator=torch.Generator().manual_seed(0))
    quantize_additive(warm, warm.T @ warm, scheme, torch.Generator().manual_seed(0), max_rounds=1)  # compiles the loops
    results = []
    for matrix, (index, path) in wanted.items():
        weight, hessian = read(decoder, moments, index, path, scheme, matrix)
        results.append(compare(weight, hessian, scheme, args.seed, matrix, args.seconds))
        record = {"scheme": str(scheme), "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
        record["matrices"] = results
        write_json(args.output, record)
        draw(record, picture_of(args.output))
        last = results[-1]
        print(
            f"{matrix}: ours {last['ours'][-1][1]:.5f} after {last['ours'][-1][0]:.1f} s, "
            f"published {last['published'][-1][1]:.5f} after {last['published'][-1][0]:.1f} s"
        )


if __name__ == "__main__":
    run_main(main)
