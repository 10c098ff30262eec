"""Machines that nobody measured: what a job's terms would take on them. Every figure from here is a prediction.

A machine differs from the measured core by a few assumed numbers, which stand here with where they are from.
"""

from dataclasses import dataclass, replace

from casp_eval.scale_fit import Fit, seconds_by_term
from casp_eval.scale_terms import CORE_FLOPS, TERMS, Job

CORE_BYTES = 4e9
"""Bytes a second that one core adds up, both operands and the sum (the same machine)."""
GPU_FLOPS = 19.5e12
"""float32 without tensor cores of an A100 with 80 GB (NVIDIA's data sheet); an H100 has 67e12."""
GPU_BYTES = 2.0e12
"""Memory of the same GPU, bytes a second (the same sheet)."""
LINK_BYTES = 25e9
"""Between two GPUs, PCI Express 4.0 x16 (NVLink has 300e9 and more)."""
SHARE = 0.5
"""Of these rates, what is reached: an assumption."""
LAUNCHES, LAUNCH = 10, 5e-6
"""Kernels that a GPU runs for a column of a matrix while it is rounded, and seconds to start one: assumptions."""

ARITHMETIC = frozenset({"products", "attention", "weights", "cubes", "decomposed"})
MEMORY = frozenset({"added"})
WIRE = frozenset({"sent"})
FIRST_ALONE = frozenset({("svd", "decomposed")})
"""What of a stage rank 0 does while the others wait."""
_ROUNDING = frozenset({"gptq", "quip-sharp", "plan"})


@dataclass(frozen=True)
class Machine:
    """So many ranks, each of which has `arithmetic` and `memory` times the speed of a measured core.

    What is neither (starting, reading files, packing and hashing what is written) is done by one core a rank.
    """

    name: str
    ranks: int
    arithmetic: float
    memory: float
    is_gpu: bool = False


def cpu_host(cores: int) -> Machine:
    """One process of so many threads, at `SHARE` of so many cores."""
    faster = max(1.0, SHARE * cores)
    return Machine(f"one CPU host, {cores} cores", 1, faster, min(faster, 8.0))


def gpus(count: int) -> Machine:
    """So many GPUs of 80 GB, a rank each."""
    name = "1 GPU" if count == 1 else f"{count} GPUs"
    return Machine(name, count, SHARE * GPU_FLOPS / CORE_FLOPS, SHARE * GPU_BYTES / CORE_BYTES, True)


def _unevenness(job: Job) -> float:
    """By how much the rank with most to do exceeds the mean: batches and blocks are not divided."""
    items = job.shape.blocks if job.stage in _ROUNDING else job.data.batches
    return -(-items // job.ranks) * job.ranks / items


def predicted_seconds(fit: Fit, job: Job, machine: Machine) -> float:
    """Seconds by the clock of `job` on `machine`, of whose ranks the busiest is waited for."""
    job = replace(job, ranks=machine.ranks)
    total = 0.0
    for term, seconds in seconds_by_term(fit, job).items():
        mine = seconds if (job.stage, term) in FIRST_ALONE else seconds / job.ranks
        if term == "start":
            total += mine
        elif term in WIRE and machine.is_gpu:
            total += 4 * TERMS[job.stage][term](job) / job.ranks / (SHARE * LINK_BYTES)
        else:
            faster = machine.arithmetic if term in ARITHMETIC else machine.memory if term in MEMORY | WIRE else 1.0
            total += mine * _unevenness(job) / faster
    if machine.is_gpu and job.stage in _ROUNDING:
        columns = job.shape.blocks * sum(columns for _, columns in job.shape.linears)
        total += LAUNCHES * LAUNCH * columns / job.ranks * _unevenness(job)
    return total
