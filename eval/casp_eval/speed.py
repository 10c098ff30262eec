"""Speed of quantized layers against dense ones: batch 1 to 16, as in generation, and the prefill of a long prompt.

Weights are cold, as they are in a model: each round runs every contender once, and the weights that are read in turn do
not fit the last cache. Figures are medians of rounds; beside them stands the best round, which other work on the
machine disturbs less.
"""

import argparse
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from casp.cli import Parser, pick_device, run_main
from casp.kernels import implementations, operators, run
from casp.numbers import whole
from casp.run.files import write_json
from casp.run.outputs import check_file, make_output
from casp_eval import ggml
from casp_eval.generation_speed import measure_generation
from casp_eval.random_layers import FAMILIES, GPTQ, bits_of, random_layer

COLUMNS = ("backend", "codebook", "what", "bits", "shape", "batch")
TIMES = ("seconds", "dense_seconds", "dense_float32_seconds")
LONG = 64  # vectors from which on a fifth of the rounds is enough
Contender = Callable[[], Tensor]


class Name(NamedTuple):
    """Who runs: quip-sharp, gptq, torch or llama.cpp; codebook; what it computes (the file's "what"); bits."""

    backend: str
    codebook: str
    what: str
    bits: float


DENSE, DENSE_FLOAT32 = Name("torch", "none", "dense", 16), Name("torch", "none", "dense", 32)


LEAST_WEIGHTS, MOST_WEIGHTS, MOST_FEATURES = 1 << 16, 1 << 28, 1 << 18
"""Weights of a layer: of smaller ones it takes thousands to fill a cache, a larger one fills the memory."""


def shape(text: str) -> tuple[int, int]:
    """Argparse type: OUTxIN, outputs and inputs of a layer."""
    found = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not OUTxIN, say 4096x11008")
    out_features, in_features = int(found[1]), int(found[2])
    if not LEAST_WEIGHTS <= out_features * in_features <= MOST_WEIGHTS:
        raise argparse.ArgumentTypeError(f"{text} is not a layer of {LEAST_WEIGHTS} to {MOST_WEIGHTS} weights")
    if max(out_features, in_features) > MOST_FEATURES:
        raise argparse.ArgumentTypeError(f"{text} has a side of more than {MOST_FEATURES}, which no layer has")
    return out_features, in_features


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(prog="speed.sh", description=__doc__.splitlines()[0])
    flags.add_argument("--output", type=Path, required=True, help="folder for speed.json")
    flags.add_argument(
        "--shapes",
        type=shape,
        nargs="+",
        default=[(4096, 4096), (4096, 11008), (11008, 4096)],
        help="outputs x inputs of the layers (default: 4096x4096 4096x11008 11008x4096)",
    )
    flags.add_argument(
        "--batches",
        type=whole(1, 1 << 14),
        nargs="+",
        default=[1, 4, 16, 1024],
        help="vectors multiplied at once, counts (default: 1 4 16 1024)",
    )
    flags.add_argument(
        "--bits",
        type=int,
        nargs="+",
        choices=[1, 2, 3, 4],
        default=[1, 2, 3, 4],
        help="bits per weight (default: 1 2 3 4)",
    )
    flags.add_argument(
        "--codebooks",
        nargs="+",
        choices=FAMILIES,
        default=list(FAMILIES),
        help=f"of QuIP#'s layers, and {GPTQ} for GPTQ's (default: {' '.join(FAMILIES)})",
    )
    flags.add_argument(
        "--generate",
        type=whole(1, 4096),
        metavar="N",
        help="measure instead how fast a Llama of the 1B shape with random weights writes N tokens at batch 1 "
        "(default: none)",
    )
    flags.add_argument(
        "--repeats",
        type=whole(1, 10_000),
        default=25,
        help=f"rounds that a median is taken of, a count; a fifth for {LONG} vectors or more (default: %(default)s)",
    )
    flags.add_argument(
        "--ggml",
        type=Path,
        metavar="DIR",
        help="a build of llama.cpp's ggml: measure its IQ2_XXS too, on the CPU, where the inputs are a multiple of "
        f"{ggml.BLOCK} (default: none)",
    )
    flags.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto = cuda if there is)")
    return flags


def last_cache_bytes(device: torch.device) -> int:
    """Size of the device's largest cache; 64 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=64 * 2**20)


def device_name(device: torch.device) -> str:
    """What the maker calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def contenders(
    codebooks: list[str],
    bits: list[int],
    out_features: int,
    in_features: int,
    batch: int,
    device: torch.device,
    library: ggml.Library | None = None,
) -> tuple[dict[Name, Contender], int]:
    """Functions that run each once, with weights of its own; and the bytes of all weights."""
    x = torch.randn(batch, in_features, device=device)
    half = x.to(torch.bfloat16)
    weight = torch.randn(out_features, in_features, device=device)
    dense = weight.to(torch.bfloat16)
    found: dict[Name, Contender] = {
        DENSE: lambda: F.linear(half, dense),
        DENSE_FLOAT32: lambda: F.linear(x, weight),
    }
    size = weight.nbytes + dense.nbytes
    for codebook in codebooks:
        for width in bits_of(codebook, bits):
            layers = [random_layer(codebook, width, out_features, in_features, device) for _ in range(2)]
            size += sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
            if codebook == GPTQ:
                found[Name(GPTQ, "none", "layer", width)] = lambda layer=layers[1]: layer(half)
                continue
            first = layers[0]
            kernel = first.codebook.product(first._buffers, out_features, first.columns, torch.bfloat16)
            rotated = torch.randn(batch, first.columns, device=device)
            found[Name("quip-sharp", codebook, "kernel", width)] = lambda kernel=kernel, x=rotated: run(kernel, x)
            found[Name("quip-sharp", codebook, "layer", width)] = lambda layer=layers[1]: layer(half)
    if library is not None and device.type == "cpu" and in_features % ggml.BLOCK == 0:
        blocks = ggml.random_blocks(out_features, in_features)
        size += blocks.nbytes
        found[Name("llama.cpp", "IQ2_XXS", "layer", 8 * ggml.BLOCK_BYTES / ggml.BLOCK)] = ggml.Product(
            library, blocks, x
        )
    return found, size


def seconds_of(run: Contender, device: torch.device) -> float:
    """How long one call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def measure(
    codebooks: list[str],
    bits: list[int],
    out_features: int,
    in_features: int,
    batch: int,
    device: torch.device,
    repeats: int,
    library: ggml.Library | None = None,
) -> list[dict[str, object]]:
    """The rows of one shape and batch."""
    arguments = (codebooks, bits, out_features, in_features, batch, device, library)
    first, size = contenders(*arguments)
    copies = -(-2 * last_cache_bytes(device) // size)
    sets = [first, *(contenders(*arguments)[0] for _ in range(copies - 1))]
    rounds = repeats if batch < LONG else max(3, repeats // 5)
    times: dict[Name, list[float]] = {name: [] for name in first}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, run in sets[turn % copies].items():
                times[name].append(seconds_of(run, device))
    # The first round loads code and fills tables.
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    least = {name: min(values[1:]) for name, values in times.items()}
    return [
        {
            **name._asdict(),
            "shape": f"{out_features}x{in_features}",
            "batch": batch,
            "device": device.type,
            "seconds": seconds,
            "dense_seconds": median[DENSE],
            "dense_float32_seconds": median[DENSE_FLOAT32],
            "speedup_vs_dense": median[DENSE] / seconds,
            "least_seconds": least[name],
            "dense_least_seconds": least[DENSE],
            "dense_float32_least_seconds": least[DENSE_FLOAT32],
        }
        for name, seconds in median.items()
        if name.backend != "torch"
    ]


def print_headings() -> None:
    """The first line of the table."""
    print(*(f"{name:>10}" for name in COLUMNS), *(f"{name.removesuffix('_seconds'):>14}" for name in TIMES), end=" ")
    print(f"{'speed-up':>10} {'best round':>11}")


def print_table(rows: list[dict[str, object]]) -> None:
    """The rows: medians, how much faster than dense bfloat16, and the same of the best rounds."""
    for row in rows:
        times = (f"{row[name] * 1e3:.3f} ms" for name in TIMES)
        best = row["dense_least_seconds"] / row["least_seconds"]
        print(*(f"{row[name]!s:>10}" for name in COLUMNS), *(f"{cell:>14}" for cell in times), end=" ")
        print(f"{row['speedup_vs_dense']:>9.2f}x {best:>10.2f}x", flush=True)


def main() -> None:
    """Measure every shape and batch and write speed.json."""
    args = parser().parse_args()
    check_file(args.output / "speed.json", [{"device", "implementation", "rows"}])
    device = pick_device(args.device)
    library = None if args.ggml is None else ggml.Library(args.ggml)
    make_output(args.output)
    sample = random_layer("e8p", 2, 8, 8, device)
    kernel = sample.codebook.product(sample._buffers, 8, sample.columns, torch.float32)
    vector = torch.zeros(1, 8, device=device)
    chosen = next(one.name for one in implementations() if one.can(kernel, vector))
    result = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "implementation": chosen,
        "instruction_sets": operators().instruction_sets() if operators() else [],
        "kernels_threaded": operators() is not None and operators().threaded(),
        "pytorch": torch.__version__,
        "last_cache_bytes": last_cache_bytes(device),
        "repeats": args.repeats,
        "dense": "torch.nn.functional.linear in bfloat16, and in float32, on the same device in the same rounds",
        "what": "kernel: the product with the decoded codes; layer: QuipSharpLinear on bfloat16, transforms "
        "included, GPTQLinear with groups of 128, or llama.cpp's product in IQ2_XXS on float32, rounding to 8 bits "
        "included",
        "rows": [],
    }
    print(f"{result['device']}, {result['threads']} threads, {chosen}; medians of {args.repeats} rounds, cold weights")
    if args.generate is not None:
        result["generation"] = measure_generation(args.generate, device)
        write_json(args.output / "speed.json", result)
        return
    print_headings()
    for out_features, in_features in args.shapes:
        for batch in args.batches:
            rows = measure(args.codebooks, args.bits, out_features, in_features, batch, device, args.repeats, library)
            print_table(rows)
            result["rows"] += rows
            write_json(args.output / "speed.json", result)


if __name__ == "__main__":
    run_main(main)
