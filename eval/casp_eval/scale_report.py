"""The tables of `scale.sh`: what was measured, what it costs, and what that predicts of other models and machines."""

from collections.abc import Mapping, Sequence
from typing import Any

from casp_eval.scale_fit import Fit, peak_bytes, seconds_by_term
from casp_eval.scale_machines import (
    CORE_BYTES,
    GPU_BYTES,
    GPU_FLOPS,
    LAUNCH,
    LAUNCHES,
    LINK_BYTES,
    SHARE,
    Machine,
    cpu_host,
    gpus,
    predicted_seconds,
)
from casp_eval.scale_terms import CORE_FLOPS, Data, Job, Shape

PIPELINE = ("moments", "plan", "quip-sharp")
"""What compress.sh runs with its defaults, nothing fine-tuned."""


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Markdown; all but the first `left` columns are set to the right."""
    line = ["---"] * left + ["---:"] * (len(heading) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, line, *rows))


def clock(seconds: float) -> str:
    """Seconds in words: 40 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _shape(shape: Shape) -> str:
    return f"{shape.hidden} / {shape.intermediate}, {shape.blocks}"


def measured(points: Mapping[Job, Mapping[str, Any]], fits: Mapping[str, tuple[Fit, Fit]]) -> str:
    """Every point beside what the fit says of it."""
    rows = []
    for job, row in points.items():
        seconds, peak = fits[job.stage]
        told = sum(seconds_by_term(seconds, job).values())
        data = f"{job.data.samples} x {job.data.length} in {job.data.batch}s"
        figures = [f"{row['processor_seconds']:.0f}", f"{told:.0f}"]
        figures += [f"{row['peak_bytes'] / 1e9:.2f}", f"{peak_bytes(peak, job) / 1e9:.2f}"]
        rows.append([job.stage, _shape(job.shape), data, str(job.ranks), *figures])
    heading = ["stage", "widths, blocks", "samples", "ranks", "processor s", "fit", "peak GB", "fit"]
    return table(heading, rows, 3)


def fit_table(fits: Mapping[str, tuple[Fit, Fit]]) -> str:
    """What one of each amount takes, and how well the fits meet points, those left out of them too."""
    rows = []
    for stage, (seconds, peak) in fits.items():
        prices = ", ".join(f"{name} {price:.2g}" for name, price in seconds.prices.items() if price)
        misses = [f"{fit.mean:.0%} / {fit.most:.0%} / {fit.unseen:.0%}" for fit in (seconds, peak)]
        held = f"{peak.prices['libraries'] / 1e9:.2f} GB + {peak.prices['formula']:.2f} x formula"
        rows.append([stage, prices, misses[0], held, misses[1]])
    miss = "misses by (mean / most / left out)"
    return table(["stage", "seconds a unit on one core", miss, "peak", miss], rows, 2)


def _told(fits: Mapping[str, tuple[Fit, Fit]], job: Job, machine: Machine) -> tuple[float, float]:
    seconds, peak = fits[job.stage]
    held = Job(job.stage, job.shape, job.data, machine.ranks)
    return predicted_seconds(seconds, job, machine), peak_bytes(peak, held)


def predictions(
    fits: Mapping[str, tuple[Fit, Fit]], shapes: Mapping[str, Shape], data: Data, machines: Sequence[Machine]
) -> str:
    """Every stage of every model on every machine, time and the peak of a rank."""
    rows = []
    for name, shape in shapes.items():
        for stage in fits:
            told = [_told(fits, Job(stage, shape, data), machine) for machine in machines]
            held = max(peak for _, peak in told)
            rows.append([name, stage, *(clock(seconds) for seconds, _ in told), f"{held / 1e9:.0f}"])
    return table(["model", "stage", *(machine.name for machine in machines), "GB a rank"], rows, 2)


def in_short(
    fits: Mapping[str, tuple[Fit, Fit]], shapes: Mapping[str, Shape], data: Data, machines: Sequence[Machine]
) -> str:
    """One row a model: all of `PIPELINE`."""
    rows = []
    for name, shape in shapes.items():
        jobs = [Job(stage, shape, data) for stage in PIPELINE]
        told = [[_told(fits, job, machine) for job in jobs] for machine in machines]
        held = max(peak for of_machine in told for _, peak in of_machine)
        rows.append(
            [name, *(clock(sum(seconds for seconds, _ in of_machine)) for of_machine in told), f"{held / 1e9:.0f} GB"]
        )
    return table(["model", *(machine.name for machine in machines), "memory a rank"], rows)


def report(
    points: Mapping[Job, Mapping[str, Any]],
    fits: Mapping[str, tuple[Fit, Fit]],
    shapes: Mapping[str, Shape],
    data: Data,
    cores: int,
    counts: Sequence[int],
) -> str:
    """The page: predictions in short and by stage, what they assume, fits and points."""
    machines = [cpu_host(cores), *map(gpus, counts)]
    return f"""# Time and memory against width, depth, tokens and ranks

`bash eval/scripts/scale.sh --output eval/results/scale` (and `--cases 7B 13B 70B`) measures the points at the end of
this page, fits them, and writes it.

## Predicted, not measured

From moments to a checkpoint of 2 bits (moments, plan, QuIP# with the trellis; nothing fine-tuned), {data.samples}
samples of {data.length} tokens in batches of {data.batch}:

{in_short(fits, shapes, data, machines)}

By stage (of svd one rank alone factors W_q and W_k):

{predictions(fits, shapes, data, machines)}

What is assumed of these machines, none of which was measured: {SHARE:.0%} of what a data sheet says is reached. A GPU
is an A100 of 80 GB, {GPU_FLOPS / 1e12:g} Tflop/s in float32 and {GPU_BYTES / 1e12:g} TB/s (NVIDIA's data sheet); the
measured core has {CORE_FLOPS / 1e9:.0f} Gflop/s and adds {CORE_BYTES / 1e9:.0f} GB/s. Two GPUs are joined by
{LINK_BYTES / 1e9:.0f} GB/s (PCI Express 4.0). Rounding runs {LAUNCHES} kernels a column, {LAUNCH * 1e6:.0f}
microseconds each to start. Starting, reading, packing and hashing files take what they take on the measured core, once
a rank. Memory is that of a process on a CPU computing in float32, libraries included: on a GPU in bfloat16 it is less.

## Fits

{fit_table(fits)}

## Measured

Processor seconds of all ranks together, one thread each, beside other work; the peak of the rank that held most.

{measured(points, fits)}
"""
