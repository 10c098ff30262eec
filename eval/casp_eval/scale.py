"""Time and memory of the stages against width, depth, tokens and ranks; and what a model would take on other machines.

Stages run on random Llamas, each in processes of its own, and are judged from outside (`casp_eval.time`). Every point
is kept as soon as it is known: an interrupted measurement goes on where it stopped. From the points follow the prices
of what each stage computes and holds (`casp_eval.scale_fit`), and from those predictions, marked as such.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from casp_entry.torchrun import PROCESSES, THREADS

from casp.cli import Parser, run_main
from casp.errors import UserError, told_as
from casp.numbers import count
from casp.reading.config import open_config
from casp.reading.documents import read_json
from casp.run.files import write_atomically, write_json
from casp.run.outputs import make_output
from casp_eval.efficiency import measure_efficiency
from casp_eval.scale_fit import Fit, fit_bytes, fit_seconds
from casp_eval.scale_report import report
from casp_eval.scale_terms import TERMS, Data, Job, Shape, job_of
from casp_eval.time import READERS, VOCABULARY, make_model, stage_flags, usage

POINTS_FILE, FIT_FILE, PAGE_FILE = "points.json", "fit.json", "scale.md"


def _random(hidden: int, intermediate: int, heads: int, key_heads: int, blocks: int) -> Shape:
    return Shape(hidden, intermediate, heads, key_heads, blocks, VOCABULARY * hidden)


def _real(hidden: int, intermediate: int, heads: int, key_heads: int, blocks: int) -> Shape:
    return Shape(hidden, intermediate, heads, key_heads, blocks, 2 * 32000 * hidden)


MODELS = {
    "7B": _real(4096, 11008, 32, 32, 32),
    "13B": _real(5120, 13824, 40, 40, 40),
    "34B": _real(8192, 22016, 64, 8, 48),
    "70B": _real(8192, 28672, 64, 8, 80),
}
"""Llama-2 and, of 34B, Code Llama."""

_SMALL = _random(512, 1408, 8, 8, 4)
_FEW = Data(16, 256, 4)
SMALL: list[tuple[Shape, Data, tuple[str, ...], tuple[int, ...]]] = [
    (_SMALL, _FEW, tuple(TERMS), (1,)),
    (replace(_SMALL, blocks=12), _FEW, tuple(TERMS), (1,)),
    (_random(1024, 2816, 16, 4, 4), _FEW, tuple(TERMS), (1,)),
    (_random(2048, 5632, 32, 8, 2), _FEW, tuple(TERMS), (1,)),
    (_SMALL, Data(64, 256, 4), ("moments", "svd"), (1,)),
    (_SMALL, Data(64, 256, 16), ("moments",), (1,)),
    (_SMALL, Data(8, 1024, 2), ("moments", "svd"), (1,)),
    (_SMALL, Data(64, 256, 4), ("moments", "gptq"), (2, 3)),
]
"""Shapes, data, stages and ranks that are measured by default: each against the first differs in one thing."""
CASES = {
    "small": SMALL,
    **{
        name: [
            (replace(MODELS[name], blocks=1, rest=VOCABULARY * MODELS[name].hidden), Data(4, 256), tuple(TERMS), (1,))
        ]
        for name in ("7B", "13B", "70B")
    },
}
"""What is measured together; of real models one block at their width."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(prog="scale.sh", description=__doc__.splitlines()[0])
    flags.add_argument(
        "--output", type=Path, required=True, help="folder to write; points in it are not measured again"
    )
    flags.add_argument(
        "--cases",
        nargs="*",
        choices=CASES,
        default=["small"],
        help="what is measured: small = half an hour, 7B, 13B, 70B = one block of that width, minutes to hours; "
        "nothing after the flag = only the tables of what is known (default: small)",
    )
    flags.add_argument("--stages", nargs="+", choices=TERMS, help="measure these alone (default: all)")
    flags.add_argument(
        "--model",
        nargs="+",
        default=list(MODELS),
        help=f"what is predicted: {', '.join(MODELS)}, or folders with a config.json of a Llama (default: all four)",
    )
    flags.add_argument("--cores", type=count, default=32, help="cores of the CPU host (default: %(default)s)")
    flags.add_argument("--gpus", type=count, nargs="+", default=[1, 4, 8], help="of 80 GB each (default: 1 4 8)")
    flags.add_argument(
        "--samples", type=count, default=128, help="calibration of the predictions (default: %(default)s)"
    )
    flags.add_argument("--sequence-length", type=count, default=512, help="tokens a sample (default: %(default)s)")
    flags.add_argument(
        "--efficiency",
        action="store_true",
        help="instead of all this: two ranks against one, and against one of two threads, by the clock, on a machine "
        "with nothing else to do (default: off)",
    )
    return flags


def shape_named(name: str) -> Shape:
    """The shape of one of `MODELS`, or of the Llama whose config is in a folder; UserError for anything else."""
    if name in MODELS:
        return MODELS[name]
    config = open_config(Path(name)).get_text_config()
    with told_as(f"{name} has no config of a Llama", f"give {', '.join(MODELS)} or a folder that has"):
        heads, keys = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        ends = 1 if config.tie_word_embeddings else 2
        rest = ends * config.vocab_size * config.hidden_size
        return Shape(config.hidden_size, config.intermediate_size, heads, keys, config.num_hidden_layers, rest)


class Points:
    """What has been measured, in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._rows: list[dict[str, Any]] = read_json(file, "the measured points", list) if file.exists() else []
        with told_as(f"{file} holds no points of scale.sh", "move it away"):
            self.known = {job_of(row["job"]): row for row in self._rows}
            for row in self._rows:
                float(row["processor_seconds"]), float(row["peak_bytes"])

    def add(self, job: Job, seconds: float, processor_seconds: float, peak: int) -> None:
        """Keep one more."""
        row = {"job": job.record(), "seconds": round(seconds, 1), "processor_seconds": round(processor_seconds, 1)}
        self._rows.append({**row, "peak_bytes": peak})
        self.known[job] = self._rows[-1]
        write_json(self._file, self._rows)


def missing(cases: list, stages: list[str], points: Points) -> Iterator[tuple[Shape, Data, list[Job]]]:
    """Of each case the jobs that are not known yet, in the order of the stages."""
    for shape, data, of_case, ranks in cases:
        jobs = [Job(stage, shape, data, size) for stage in of_case if stage in stages for size in ranks]
        jobs = [job for job in jobs if job not in points.known]
        if jobs:
            yield shape, data, jobs


def measure(cases: list, stages: list[str], points: Points) -> None:
    """Measure what is not known, on one thread a rank; the models and moments lie in a temporary folder."""
    for shape, data, jobs in missing(cases, stages, points):
        with tempfile.TemporaryDirectory(prefix="casp-scale-") as scratch:
            model, folder = Path(scratch) / "model", Path(scratch)
            make_model(shape, model)
            for job in jobs:
                if job.stage in READERS and not (folder / "moments").exists():
                    usage(stage_flags("moments", model, folder, data.samples, data.length, data.batch))
                output = folder / job.stage
                shutil.rmtree(output, ignore_errors=True)
                flags = stage_flags(job.stage, model, folder, data.samples, data.length, data.batch)
                used = usage(flags, {PROCESSES: str(job.ranks), THREADS: "1"})
                points.add(job, used.seconds, used.processor_seconds, used.peak_bytes)
                print(
                    f"{job}: {used.processor_seconds:.1f} processor seconds, {used.peak_bytes / 1e9:.2f} GB", flush=True
                )
                if job.stage != "moments":
                    shutil.rmtree(output)


def fitted(points: Points) -> dict[str, tuple[Fit, Fit]]:
    """Stage -> the fits of its processor seconds and of its peak; UserError where a stage has too few points."""
    found = {}
    for stage in TERMS:
        rows = {job: row for job, row in points.known.items() if job.stage == stage}
        if len(rows) < 2:
            raise UserError(f"{stage} has been measured {len(rows)} times, and two are needed; leave --cases out.")
        seconds = fit_seconds(list(rows), [row["processor_seconds"] for row in rows.values()])
        found[stage] = seconds, fit_bytes(list(rows), [row["peak_bytes"] for row in rows.values()])
    return found


def main() -> None:
    """Measure, fit, and write the tables."""
    args = parser().parse_args()
    shapes = {name: shape_named(name) for name in args.model}
    make_output(args.output)
    if args.efficiency:
        measure_efficiency(args.output)
        return
    points = Points(args.output / POINTS_FILE)
    measure([case for name in args.cases for case in CASES[name]], args.stages or list(TERMS), points)
    fits = fitted(points)
    record = {stage: {"seconds": asdict(s), "bytes": asdict(b)} for stage, (s, b) in fits.items()}
    write_json(args.output / FIT_FILE, record)
    page = report(points.known, fits, shapes, Data(args.samples, args.sequence_length), args.cores, args.gpus)
    write_atomically(args.output / PAGE_FILE, page.encode())
    print(page)


if __name__ == "__main__":
    run_main(main)
