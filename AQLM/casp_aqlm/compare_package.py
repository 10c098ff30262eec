"""Time of one layer's product: this room's kernel, the package `aqlm`, and dense layers: a JSON file.

`python -m casp_aqlm.compare_package --output FILE.json`

Weights are cold: every contender has several layers, and in each round runs the next of them, all contenders in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from casp.cli import Parser, run_main
from casp.errors import UserError
from casp.numbers import whole
from casp.run.files import write_json
from casp.run.outputs import check_file
from casp_aqlm.linear import AQLMLinear
from casp_aqlm.scheme import Scheme

COPIES = 4  # layers of a contender: too many for the caches
_INTEGERS = {8: torch.int8}  # what the package holds codes in; int16 otherwise


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(prog="python -m casp_aqlm.compare_package", description=__doc__.splitlines()[0])
    flags.add_argument("--schemes", nargs="+", default=["2x8g8", "2x12g8", "1x16g8"], help="MxBgG ...")
    flags.add_argument("--out-features", type=whole(256, 1 << 15), default=4096, help="(default: %(default)s)")
    flags.add_argument("--in-features", type=whole(256, 1 << 15), default=4096, help="(default: %(default)s)")
    flags.add_argument("--batch", type=whole(1, 64), default=1, help="vectors (default: %(default)s)")
    flags.add_argument("--rounds", type=whole(1, 1000), default=12, help="(default: %(default)s)")
    flags.add_argument("--output", type=Path, required=True, help="JSON file to write")
    return flags


def ours(scheme: Scheme, out_features: int, in_features: int) -> AQLMLinear:
    """A layer of random codes."""
    layer = AQLMLinear(out_features, in_features, False, scheme.format)
    layer.codes.random_(0, 256)
    layer.codebooks.fill_(1 / 64)
    layer.scales.fill_(1)
    return layer


def theirs(scheme: Scheme, out_features: int, in_features: int) -> torch.nn.Module:
    """The package's layer of this scheme, random codes, in float32 as it wants on a CPU."""
    try:
        from aqlm import QuantizedLinear
    except ImportError as error:
        raise UserError(f"the package aqlm does not import ({error}); install it: pip install aqlm.") from error
    sizes = (in_features, out_features, scheme.group, 1, scheme.codebooks, scheme.code_bits)
    layer = QuantizedLinear(*sizes, bias=False, dtype=torch.float32)
    half = scheme.size // 2
    layer.codes.data = torch.randint(-half, half, layer.codes.shape, dtype=_INTEGERS.get(scheme.code_bits, torch.int16))
    layer.codebooks.data.fill_(1 / 64)
    layer.scales.data.fill_(1)
    return layer


def contenders(schemes: list[Scheme], out_features: int, in_features: int) -> dict[str, tuple[list[Callable], str]]:
    """Name -> layers that are run in turn, and the dtype of what they are given."""
    found: dict[str, tuple[list[Callable], str]] = {}
    for dtype in ("bfloat16", "float32"):
        dense = [torch.randn(out_features, in_features).to(getattr(torch, dtype)) for _ in range(COPIES)]
        found[f"dense {dtype}"] = ([lambda x, weight=weight: F.linear(x, weight) for weight in dense], dtype)
    for scheme in schemes:
        found[f"casp {scheme}"] = ([ours(scheme, out_features, in_features) for _ in range(COPIES)], "bfloat16")
        found[f"aqlm {scheme}"] = ([theirs(scheme, out_features, in_features) for _ in range(COPIES)], "float32")
    return found


def main(argv: list[str] | None = None) -> None:
    """Run every contender once a round."""
    args = parser().parse_args(argv)
    check_file(args.output, [{"layers", "threads"}])
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    running = contenders([Scheme.parse(text) for text in args.schemes], args.out_features, args.in_features)
    x = torch.randn(args.batch, args.in_features)
    given: dict[str, Tensor] = {dtype: x.to(getattr(torch, dtype)) for dtype in ("bfloat16", "float32")}
    times: dict[str, list[float]] = {name: [] for name in running}
    for layers, dtype in running.values():  # compiles and lays out what is done once
        for layer in layers:
            layer(given[dtype])
    for number in range(args.rounds):
        for name, (layers, dtype) in running.items():
            began = time.perf_counter()
            layers[number % COPIES](given[dtype])
            times[name].append(time.perf_counter() - began)
    dense = min(times["dense bfloat16"])
    record = {
        name: {"best": min(t), "median": statistics.median(t), "of_dense": min(t) / dense} for name, t in times.items()
    }
    shape = {"out_features": args.out_features, "in_features": args.in_features, "batch": args.batch}
    about = {**shape, "threads": torch.get_num_threads(), "rounds": args.rounds, "date": time.strftime("%Y-%m-%d")}
    write_json(args.output, {**about, "layers": record})
    for name, found in record.items():
        print(f"{name}: best {1e3 * found['best']:.2f} ms, {found['of_dense']:.2f} of dense bfloat16")


if __name__ == "__main__":
    run_main(main)
