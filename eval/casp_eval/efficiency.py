"""Two ranks of one thread against one, and against one of two threads, by the clock.

Each stage is run as a user starts it, then once more where nothing is left to do: what that takes is starting, which
no number of ranks makes shorter, and is told apart. Only a machine with nothing else to do gives figures of use.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from casp_entry.torchrun import PROCESSES, THREADS

from casp.run.files import write_json
from casp_eval.scale_terms import Shape
from casp_eval.time import VOCABULARY, Usage, make_model, usage

EFFICIENCY_FILE = "efficiency.json"
COMMAND = "bash eval/scripts/scale.sh --efficiency --output eval/results/scale"
WAYS = ((1, 1), (2, 1), (1, 2))
"""Ranks, and threads of each."""
_SHAPE = Shape(512, 1408, 8, 8, 4, VOCABULARY * 512)
_DATA = ["--dataset", "demo-text", "--sequence-length"]
_TWO_BITS = ["casp_quip_sharp", "--bits", "2", "--from-original", "--sweeps", "0"]
_FROM_ATTENTION = ["--from-original", "--token-weights", "attention"]
STAGES = {
    "moments": ["casp.moments", *_DATA, "512", "--samples", "16"],
    "quantizing from moments": ["casp_quip_sharp", "--bits", "2", "--ft-epochs", "0", *_FROM_ATTENTION],
    "with both fine-tunings": [*_TWO_BITS, *_DATA, "128", "--samples", "24", "--ft-epochs", "1"],
    "evaluation": ["casp_eval.perplexity", "--dataset", "validation", "--sequence-length", "256"],
}
WINDOWS = {"all": "96", "least": "2"}
"""Of the evaluation: all of them, and the least, which is all that it can be told to leave undone."""


def _run(name: str, scratch: Path, work: str, ranks: int, threads: int) -> Usage:
    """One stage, into a folder of its own in `scratch`; work: "all", or "least" for what is left once it is done."""
    target = scratch / f"{name}-{ranks}-{threads}"
    flags = [*STAGES[name], "--model", str(scratch / "model"), "--device", "cpu"]
    if name == "evaluation":
        target = scratch / f"{target.name}-{work}.json"
        flags += ["--windows", WINDOWS[work]]
    elif name != "moments":
        flags += ["--moments", str(scratch / "moments-1-1")]
    return usage([*flags, "--output", str(target)], {PROCESSES: str(ranks), THREADS: str(threads)})


def speedups(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Stage -> how many times faster two ranks are than one of as many threads, and than one of two threads."""
    found: dict[str, dict[str, float]] = {}
    for name in STAGES:
        took = {(row["ranks"], row["threads"]): row for row in rows if row["stage"] == name}
        for word, other in (("one rank of one thread", (1, 1)), ("one rank of two threads", (1, 2))):
            if {(2, 1), other} <= took.keys():
                two, one = took[2, 1], took[other]
                found.setdefault(name, {})[word] = round(
                    (one["seconds"] - one["start"]) / (two["seconds"] - two["start"]), 2
                )
    return found


def measure_efficiency(folder: Path) -> dict[str, Any]:
    """Run all stages in all ways; the figures go to `folder`, after each of them."""
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="casp-scale-") as place:
        scratch = Path(place)
        make_model(_SHAPE, scratch / "model")
        for name in STAGES:
            for ranks, threads in WAYS:
                used, start = (_run(name, scratch, work, ranks, threads) for work in ("all", "least"))
                rows.append(
                    {
                        "stage": name,
                        "ranks": ranks,
                        "threads": threads,
                        "seconds": round(used.seconds, 1),
                        "start": round(start.seconds, 1),
                        "processor_seconds": round(used.processor_seconds - start.processor_seconds, 1),
                    }
                )
                print(rows[-1], flush=True)
                result = {"command": COMMAND, "cores": os.cpu_count(), "load": os.getloadavg()[0], "rows": rows}
                write_json(folder / EFFICIENCY_FILE, result | {"times_faster": speedups(rows)})
            for made in scratch.glob(f"{name}-*"):
                if made.is_dir() and made.name != "moments-1-1":
                    shutil.rmtree(made)
    print(speedups(rows))
    return result
