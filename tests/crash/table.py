"""The crash-point table: `python tests/crash/table.py [STAGE...]` runs every stage, and a rerun from every state.

`--every K` goes on from each K-th state only, and counts all of them.

The code under test is whichever `casp` is importable, so the same command counts for any version of it.
"""

import argparse
import contextlib
import io
import os
import tempfile
from collections import Counter
from pathlib import Path

from disk_states import recorded, torn
from small_stages import STAGES, contents, rerun, tiny_inputs


def row(name: str, scratch: Path, every: int) -> tuple[str, list[str]]:
    """One line of the table, and what went wrong, state by state."""
    stage, root = STAGES[name], scratch / "root"
    model, text = tiny_inputs(scratch)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        stage(model, text, root)
        expected = contents(root)
        root.rename(scratch / "whole")
        root.mkdir()
        with recorded(root, scratch / "states") as run:
            stage(model, text, root)
        cut = torn(run.states, scratch / "cut")
        unsure = run.unsure()
        states = [*run.states, *cut, *run.dark]
        outcomes = [(state, rerun(stage, model, text, root, state, expected)) for state in states[::every]]
    counts = Counter(outcome.partition(":")[0] for _, outcome in outcomes)
    kinds = ("same bytes", "other bytes", "lost", "refused")
    labels = dict(zip(run.states, run.labels, strict=True))
    bad = [f"{labels.get(s, s.name)}: {outcome}" for s, outcome in outcomes if outcome != "same bytes"]
    bad += [f"{path} is not synced at the end" for path in unsure]
    cells = [name, run.operations, len(run.states), len(cut), len(run.dark), *(counts[kind] for kind in kinds)]
    return f"| {' | '.join(map(str, cells))} |", bad


def main() -> None:
    """Print the table, then every state that is not continued to the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="rerun from each K-th state (default: 1)")
    args = parser.parse_args()
    print("| stage | operations | states | half-written | power lost | same bytes | other bytes | lost | refused |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    wrong = []
    for name in args.stages or STAGES:
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["CASP_CACHE"] = f"{scratch}/cache"
            line, bad = row(name, Path(scratch), args.every)
        print(line, flush=True)
        wrong += [f"- {name}, {what}" for what in bad]
    print("\n".join(wrong))


if __name__ == "__main__":
    main()
