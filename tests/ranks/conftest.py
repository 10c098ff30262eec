"""Processes that are ranks of one run, and the small stages that the crash tests run too."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BESIDE = [str(HERE), str(HERE.parent / "crash")]
sys.path[:0] = BESIDE


@pytest.fixture(scope="session")
def forks():
    """Processes forked from one that has imported everything, and has computed nothing."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(BESIDE), prepend=os.pathsep)
        context.set_forkserver_preload(["rank_processes"])
        yield context


@pytest.fixture
def together(forks, tmp_path):
    """Runs `work(*args)` in so many ranks: the outcome of each."""
    from rank_processes import Started

    count = iter(range(1000))

    def run(size, work, *args, **how):
        return Started(forks, tmp_path / f"ranks-{next(count)}", size, work, *args).ended(**how)

    return run
