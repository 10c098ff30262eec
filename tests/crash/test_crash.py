"""A run that dies at any file operation is continued to the same bytes; so it is beside a second process."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
from disk_states import recorded, torn
from small_stages import STAGES, contents, rerun, run_quietly, tiny_inputs

from casp.errors import UserError
from casp.run.folder import WorkFolder

QUICK = ["SVD", "moments", "GPTQ", "GPTQ with export"]
SEVERAL = ["GPTQ with export", "compress"]  # which fill one folder after the other
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Model and text of all runs here."""
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


class Second:
    """Another process that wants the same output, at every file operation of the first."""

    def __init__(self, monkeypatch):
        self.wanted, self.met = None, []
        real = WorkFolder.__init__

        def noted(folder, *args, **kwargs):
            self.wanted = (type(folder), args, kwargs)
            real(folder, *args, **kwargs)

        monkeypatch.setattr(WorkFolder, "__init__", noted)
        self._open = real

    def tries(self):
        if self.wanted is None:
            return
        kind, args, kwargs = self.wanted
        folder = kind.__new__(kind)
        try:
            self._open(folder, *args, **kwargs)
        except UserError as error:
            self.met.append("busy" if "another process is writing" in str(error) else str(error))
        else:
            self.met.append("finished" if folder.done else "free")
            folder.release()


def every_state(name, inputs, tmp_path, monkeypatch, last_only):
    stage, root = STAGES[name], tmp_path / "root"
    stage(*inputs, root)
    expected = contents(root)
    assert not [path for path in expected if ".partial" in path or ".casp-tmp" in path or ".lock" in path]
    root.rename(tmp_path / "whole")
    root.mkdir()
    with monkeypatch.context() as patch:
        second = Second(patch)
        with recorded(root, tmp_path / "states", second.tries) as run:
            stage(*inputs, root)
    assert contents(root) == expected
    # Before the first has the lock it may be had; from then on it is held until the result stands.
    order = "".join({"free": "f", "busy": "b", "finished": "d"}.get(met, met) for met in second.met)
    for part in order.split("d" if name in SEVERAL else "\0"):
        assert part.lstrip("f").rstrip("d").strip("b") == "", order
    assert order.count("b") > 10
    assert order.endswith("d")
    assert run.unsure() == []
    states = [*run.states, *torn(run.states, tmp_path / "cut"), *run.dark]
    if last_only:
        states = [state for state in states if list(state.rglob("*-00001-of-*.safetensors"))] or states
    assert len(states) > 10
    outcomes = {state.name: rerun(stage, *inputs, root, state, expected) for state in states}
    assert {state: outcome for state, outcome in outcomes.items() if outcome != "same bytes"} == {}


@pytest.mark.parametrize("name", QUICK)
def test_a_death_from_the_last_block_on_costs_nothing(name, inputs, tmp_path, monkeypatch):
    every_state(name, inputs, tmp_path, monkeypatch, last_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_death_at_any_file_operation_costs_nothing(name, inputs, tmp_path, monkeypatch):
    every_state(name, inputs, tmp_path, monkeypatch, last_only=False)


@pytest.fixture(scope="module")
def forks():
    """Processes forked from one that has imported everything, and has computed nothing."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
        context.set_forkserver_preload(["all_stages"])
        yield context


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_kill_9_at_random_moments(name, inputs, tmp_path, forks):
    """In processes of their own: a run that was killed a dozen times, and resumed each time, is continued."""
    root = tmp_path / "root"  # of every run here: a recipe names the places that it was given
    took = 0.0
    for place in ("first", "whole"):
        began = time.monotonic()
        finish(forks, name, *inputs, root)
        took = time.monotonic() - began
        root.rename(tmp_path / place)
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "first") == whole
    chance, killed = random.Random(name), 0
    for _ in range(12):
        child = forks.Process(target=run_quietly, args=(name, *inputs, root))
        child.start()
        child.join(chance.random() * took / 4)  # the work goes on from one to the next: a quarter is far enough
        killed += child.is_alive()
        child.kill()  # nothing where it has ended already
        child.join()
    assert killed > 0
    finish(forks, name, *inputs, root)
    assert contents(root) == whole


def finish(forks, name, model, text, root):
    child = forks.Process(target=run_quietly, args=(name, model, text, root))
    child.start()
    child.join()
    assert child.exitcode == 0
