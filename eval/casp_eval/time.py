"""Seconds a block and peak memory of every stage on a random model of a real one's shape.

Each stage runs in a process of its own, as a user would start it, and is judged from outside: wall and processor time
over the number of blocks, start and all, and the peak of resident memory as the operating system accounts for it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from casp_entry.torchrun import PROCESSES, processes

from casp.cli import Parser, run_main
from casp.demo.models import build
from casp.job import LAUNCHER
from casp.numbers import count
from casp.reading.config import open_config
from casp.reading.documents import read_json
from casp.run.files import write_json
from casp.run.outputs import check_file, make_output, read_record, require_writable
from casp_eval.memory import random_model
from casp_eval.scale_terms import Shape

_QUANTIZE = ["--from-original", "--token-weights", "attention"]
_TWO_BITS = ["--bits", "2", *_QUANTIZE]
STAGES: dict[str, list[str]] = {
    "moments, forward": ["casp.moments", "--token-weights", "attention", "--no-gradients"],
    "moments": ["casp.moments"],
    "svd": ["casp_svd"],
    "gptq": ["casp_gptq", *_TWO_BITS],
    "quip-sharp": ["casp_quip_sharp", "--ft-epochs", "0", *_TWO_BITS],
    "plan": ["casp.plan", "--backend", "quip-sharp", "--format", "codebook=trellis"],
    "aqlm": ["casp_aqlm", "--ft-epochs", "0", "--e2e-epochs", "0", *_QUANTIZE],
}
"""Module and flags of each; from the quantizers on they read what "moments" collected. Nothing is fine-tuned."""
READERS = ("gptq", "quip-sharp", "plan", "aqlm")
VOCABULARY = 49152
"""Of demo-llama, and so of the random models, whose head is the embeddings."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(prog="time.sh", description=__doc__.splitlines()[0])
    flags.add_argument(
        "--output", type=Path, required=True, help="JSON file to write; figures of other stages in it stay"
    )
    flags.add_argument("--scratch", type=Path, help="folder for the model and the moments (default: a temporary one)")
    flags.add_argument("--stages", nargs="+", choices=STAGES, help="which (default: all but aqlm)")
    flags.add_argument("--hidden", type=count, default=4096, help="hidden size (default: %(default)s)")
    flags.add_argument("--intermediate", type=count, default=11008, help="width of the MLP (default: %(default)s)")
    flags.add_argument("--heads", type=count, default=32, help="heads (default: %(default)s)")
    flags.add_argument("--key-heads", type=count, default=32, help="heads of keys and values (default: %(default)s)")
    flags.add_argument("--blocks", type=count, default=2, help="blocks of the model (default: %(default)s)")
    flags.add_argument("--samples", type=count, default=8, help="calibration samples (default: %(default)s)")
    flags.add_argument("--sequence-length", type=count, default=512, help="tokens a sample (default: %(default)s)")
    return flags


@dataclass(frozen=True)
class Usage:
    """What a command took: seconds by the clock and of processors, and its peak bytes.

    Of several processes the sum of their processor seconds and the highest of their peaks.
    """

    seconds: float
    processor_seconds: float
    peak_bytes: int

    def a_block(self, blocks: int) -> dict[str, float]:
        """The record of a stage: seconds a block, and the peak."""
        return {
            "seconds_a_block": round(self.seconds / blocks, 1),
            "processor_seconds_a_block": round(self.processor_seconds / blocks, 1),
            "peak_bytes": self.peak_bytes,
        }


def usage(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Usage:
    """Of `python -m ARGUMENTS`, run to its end in as many processes as CASP_PROCESSES says; SystemExit where it fails.

    environment: more of it.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", LAUNCHER, "-m", *arguments]
    child = subprocess.Popen(command, stdout=sys.stderr, env={**os.environ, **(environment or {})})
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(child.returncode)  # the stage has said why
    return Usage(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def make_model(shape: Shape, folder: Path) -> None:
    """A random Llama of a shape, bfloat16, with the tokenizer of demo-llama, in a process of its own."""
    small = build("demo-llama")
    config = open_config(small)
    config.update(
        {
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_heads,
            "num_hidden_layers": shape.blocks,
            "head_dim": shape.hidden // shape.heads,
        }
    )
    # What is forked from this process later starts with its peak: the model must not be made in it.
    maker = get_context("spawn").Process(target=random_model, args=(config, small, folder))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit(maker.exitcode)


def stage_flags(name: str, model: Path, scratch: Path, samples: int, length: int, batch: int = 8) -> list[str]:
    """Module and flags of the stage `name`, which works in a folder of its name in `scratch`.

    `scratch` holds the moments that some stages read.
    """
    target = scratch / name.replace(", ", "-")
    flags = [*STAGES[name], "--model", str(model)]
    if name == "plan":
        flags += ["--output", str(target / "plan.json"), "--costs", str(target)]
    else:
        flags += ["--samples", str(samples), "--sequence-length", str(length), "--batch-size", str(batch)]
        flags += ["--dataset", "demo-text", "--output", str(target)]
    return flags + (["--moments", str(scratch / "moments")] if name in READERS else [])


def shape_of(args: argparse.Namespace) -> Shape:
    """The shape that the flags ask for, with the embeddings of demo-llama's vocabulary."""
    return Shape(args.hidden, args.intermediate, args.heads, args.key_heads, args.blocks, VOCABULARY * args.hidden)


def measure(args: argparse.Namespace, scratch: Path) -> None:
    """Run the stages, and write the output after each."""
    model, shape = scratch / "model", shape_of(args)
    if not model.exists():
        make_model(shape, model)
    result = read_json(args.output, "the file of figures") if args.output.exists() else {"stages": {}}
    result |= {"processes": processes(os.environ.get(PROCESSES) or "1"), "threads": torch.get_num_threads()}
    result |= {"shape": [args.hidden, args.intermediate, args.blocks]}
    for name in args.stages or [name for name in STAGES if name != "aqlm"]:
        if name in READERS and not (scratch / "moments").exists():
            print(f"{name} needs moments, which are collected first", flush=True)
            usage(stage_flags("moments", model, scratch, args.samples, args.sequence_length))
        flags = stage_flags(name, model, scratch, args.samples, args.sequence_length)
        if name == "moments" and read_record(scratch / name):  # finished, they would be passed over
            shutil.rmtree(scratch / name)
        result["stages"][name] = usage(flags).a_block(args.blocks)
        print(name, result["stages"][name], flush=True)
        write_json(args.output, result)
        if name != "moments":
            shutil.rmtree(scratch / name.replace(", ", "-"))


def main() -> None:
    """Measure the stages."""
    args = parser().parse_args()
    check_file(args.output, [{"threads", "stages"}])
    require_writable(args.output)
    if args.scratch is not None:
        make_output(args.scratch, "--scratch")
        measure(args, args.scratch)
        return
    with tempfile.TemporaryDirectory(prefix="casp-time-") as scratch:
        measure(args, Path(scratch))


if __name__ == "__main__":
    run_main(main)
