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
from collections.abc import Sequence
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
from casp.run.outputs import check_file, make_output
from casp_eval.memory import random_model
from casp_eval.options import require_writable

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
_READERS = ("gptq", "quip-sharp", "plan", "aqlm")


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


def usage(arguments: Sequence[str], blocks: int) -> dict[str, float]:
    """Seconds a block and peak bytes of `python -m ARGUMENTS`, run to its end; SystemExit where it fails.

    In as many processes as CASP_PROCESSES says: of their times the sum, of their peaks the highest.
    """
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", LAUNCHER, "-m", *arguments], stdout=sys.stderr)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(child.returncode)  # the stage has said why
    return {
        "seconds_a_block": round((time.perf_counter() - began) / blocks, 1),
        "processor_seconds_a_block": round((used.ru_utime + used.ru_stime) / blocks, 1),
        "peak_bytes": used.ru_maxrss * 1024,
    }


def make_model(args: argparse.Namespace, folder: Path) -> None:
    """A random Llama of the shape asked for, bfloat16, with the tokenizer of demo-llama, in a process of its own."""
    small = build("demo-llama")
    config = open_config(small)
    config.update(
        {
            "hidden_size": args.hidden,
            "intermediate_size": args.intermediate,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.key_heads,
            "num_hidden_layers": args.blocks,
            "head_dim": args.hidden // args.heads,
        }
    )
    # What is forked from this process later starts with its peak: the model must not be made in it.
    maker = get_context("spawn").Process(target=random_model, args=(config, small, folder))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit(maker.exitcode)


def measure(args: argparse.Namespace, scratch: Path) -> None:
    """Run the stages, and write the output after each."""
    model = scratch / "model"
    if not model.exists():
        make_model(args, model)
    data = ["--samples", str(args.samples), "--sequence-length", str(args.sequence_length), "--dataset", "demo-text"]
    result = read_json(args.output, "the file of figures") if args.output.exists() else {"stages": {}}
    result |= {"processes": processes(os.environ.get(PROCESSES) or "1"), "threads": torch.get_num_threads()}
    result |= {"shape": [args.hidden, args.intermediate, args.blocks]}
    for name in args.stages or [name for name in STAGES if name != "aqlm"]:
        target = scratch / name.replace(", ", "-")
        flags = [*STAGES[name], "--model", str(model)]
        flags += ["--output", str(target / "plan.json"), "--costs", str(target)] if name == "plan" else data
        flags += [] if name == "plan" else ["--output", str(target)]
        flags += ["--moments", str(scratch / "moments")] if name in _READERS else []
        result["stages"][name] = usage(flags, args.blocks)
        print(name, result["stages"][name], flush=True)
        write_json(args.output, result)
        if name != "moments":
            shutil.rmtree(target)


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
