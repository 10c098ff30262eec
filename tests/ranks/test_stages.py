"""1, 2 and 3 ranks give the same bytes, in every stage that ranks share, also where their number changes on the way."""

import json
import os
import random
import signal
import time

import pytest
from PIL import Image
from rank_processes import SHARED, Started, moments, questions, stage
from small_stages import contents, tiny_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Model and text of all runs here."""
    model, text = tiny_inputs(tmp_path_factory.mktemp("inputs"), blocks=4)
    moments(model, text, model.parent / "collected")
    return model, text


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """What one process leaves, by the name of the stage."""
    made = {}

    def run(name):
        if name not in made:
            root = tmp_path_factory.mktemp("alone") / "root"
            SHARED[name](*inputs, root)
            made[name] = contents(root)
        return made[name]

    return run


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("moments", 2),
        *((name, 3) for name in SHARED if name != "compare"),  # whose plots take the time of all others
        *(pytest.param(name, 4, marks=pytest.mark.slow) for name in SHARED),
    ],
)
def test_the_same_bytes_from_any_number_of_ranks(name, size, inputs, alone, tmp_path, together):
    outcomes = together(size, stage, name, *inputs, tmp_path / "root")
    assert outcomes[0][0] == 0, outcomes[0][2]
    assert outcomes[1:] == [(0, "", "")] * (size - 1)
    assert contents(tmp_path / "root") == alone(name)


def test_what_each_rank_did_and_waited_stands_beside_the_result(inputs, tmp_path, together):
    together(2, stage, "moments", *inputs, tmp_path / "root")
    accounts = json.loads((tmp_path / "root/out/casp_ranks.json").read_text())
    assert [account["rank"] for account in accounts] == [0, 1]
    assert [account["did"] for account in accounts] == [{"batches": 24}, {"batches": 16}]  # 3 and 2, 4 blocks, 2 passes
    for account in accounts:
        assert 0 < account["waited"] < account["seconds"]
        assert account["processor_seconds"] > 0
        assert account["peak_bytes"] > 1 << 26


def test_questions_are_shared_out(tiny_llava, tmp_path, together):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    rows = [{"image": "red.png", "question": f"What {word}?", "answer": word, "kind": "a"} for word in "abcde"]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions(tiny_llava, asked, tmp_path / "alone")
    assert [status for status, _, _ in together(2, stage, "questions", tiny_llava, asked, tmp_path / "root")] == [0, 0]
    assert contents(tmp_path / "root") == contents(tmp_path / "alone")


def test_a_run_goes_on_with_another_number_of_ranks_after_a_kill(inputs, alone, tmp_path, forks, together):
    root = tmp_path / "root"
    run = Started(forks, tmp_path / "killed", 3, stage, "moments", *inputs, root)
    until = time.monotonic() + 60
    while not list(root.glob("out.partial/result/inputs-00000*")) and time.monotonic() < until:
        time.sleep(0.001)
    os.kill(run.processes[2].pid, signal.SIGKILL)
    assert [status for status, _, _ in run.ended()][2] == -signal.SIGKILL
    assert not (root / "out").exists()
    ((first, said, _), *_) = together(2, stage, "moments", *inputs, root)
    assert first == 0
    assert "resuming" in said
    assert contents(root) == alone("moments")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_kills_of_random_ranks_at_random_moments(name, inputs, alone, tmp_path, forks, together):
    """Thirty of them, each followed by a run of another number of ranks that goes on."""
    root, chance, killed = tmp_path / "root", random.Random(name), 0
    alone(name)
    together(2, stage, name, *inputs, tmp_path / "first")  # starts the process that the ranks are forked from
    began = time.monotonic()
    together(2, stage, name, *inputs, tmp_path / "timed")
    took = time.monotonic() - began
    for attempt in range(30):
        size = chance.choice([2, 3])
        run = Started(forks, tmp_path / f"killed-{attempt}", size, stage, name, *inputs, root)
        time.sleep(chance.random() * took)
        victim = run.processes[chance.randrange(size)]
        killed += victim.exitcode is None
        victim.kill()
        finished = run.ended()[0][0] == 0
        if finished and (root / "out").exists() and chance.random() < 0.8:  # what is finished costs nothing: begin anew
            assert contents(root) == alone(name)
            root.rename(tmp_path / f"done-{attempt}")
    together(3, stage, name, *inputs, root)
    assert killed > 10
    assert contents(root) == alone(name)
