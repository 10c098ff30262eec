"""What ranks tell each other does not depend on how many there are; one that ends badly ends all, with one sentence."""

import socket
import time

import pytest
from rank_processes import exchange, fails, not_shared, on_one_gpu

from casp.errors import UserError
from casp.ranks import ALONE, Ranks
from casp.ranks.group import Place, place_of

HOST = socket.gethostname()


def test_alone_nothing_is_exchanged():
    found = []
    ALONE.in_order(range(3), found.append, lambda item: pytest.fail("sent"), lambda message: pytest.fail("received"))
    assert found == [0, 1, 2]
    assert ALONE.by_item([4, 5]) == [4, 5]
    assert ALONE.told(lambda: 7) == 7
    assert ALONE.shared_out([3, 1]) == [0, 1]


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_told_comes_in_the_order_of_the_items(size, together):
    outcomes = together(size, exchange, 7)
    items = [[item, [item / 3] * 2, [], [item]] for item in range(7)]
    found = [[i, [pytest.approx(v) for v in values], *rest] for i, values, *rest in items]
    others, *printed = outcomes[0][1].splitlines()
    assert eval(others) == list(range(1, size))
    assert eval(printed[0]) == found
    assert printed[1] == "[0, 1, 4, 9, 16, 25, 36] ['of', 0]"
    assert outcomes[1:] == [(0, "", "")] * (size - 1)  # only rank 0 prints


def test_the_dearest_items_are_shared_out_first():
    costs = [1, 1, 1, 9, 4, 4]
    shares = [Ranks(rank, 3).shared_out(costs) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(6))
    assert max(sum(costs[item] for item in share) for share in shares) == 9
    assert all(share == sorted(share) for share in shares)


@pytest.mark.parametrize("rank", [0, 1, -1])
def test_bad_input_is_one_sentence_of_rank_0_whoever_meets_it(rank, together):
    outcomes = together(3, fails, "bad input", rank)
    where = f"rank 1 on {HOST}: " if rank == 1 else ""
    assert outcomes == [
        (2, "", f"error: {where}this cannot be used; give something else.\n"),
        (2, "", ""),
        (2, "", ""),
    ]


def test_a_mistake_of_ours_names_its_rank_and_is_shown_where_it_was_made(together):
    (first, _, told), (other, _, shown) = together(2, fails, "mistake", 1)
    assert first == other == 1
    assert told.startswith(f"error: rank 1 on {HOST} failed (TypeError: nobody foresaw this)")
    assert len(told.splitlines()) == 1
    assert "\nTraceback" in shown


@pytest.mark.parametrize(
    ("how", "by_torchrun"),
    [
        ("SIGKILL", True),
        pytest.param("SIGKILL", False, marks=pytest.mark.slow),
        pytest.param("SIGSTOP", False, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_killed_or_stopped_ends_the_run_within_a_minute(how, by_torchrun, together):
    began = time.monotonic()
    outcomes = together(3, fails, how, 1, by_torchrun=by_torchrun)
    assert time.monotonic() - began < 60
    status, _, told = outcomes[0]
    assert status == 1
    assert told.startswith(f"error: rank 1 on {HOST} does not answer any more")
    assert len(told.splitlines()) == 1
    assert outcomes[2][0] != 0


def test_a_gpu_for_all_ranks_is_none(together):
    ((status, _, told), *_) = together(2, on_one_gpu)
    assert (status, told) == (
        2,
        "error: --device cuda:0 is one GPU for all 2 ranks; give cuda, and each takes its own.\n",
    )


def test_a_command_that_is_one_process_says_so(together):
    outcomes = together(2, not_shared, by_torchrun=False)  # which might end a rank before it has begun
    assert [status for status, _, _ in outcomes] == [2, 2]
    assert outcomes[0][2].startswith("error: this command is one process, and 2 ranks of it were started")
    assert outcomes[1][1:] == ("", "")


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Place(3, 4, 1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # the script of sbatch
        (
            {
                "SLURM_PROCID": "2",
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_LOCALID": "0",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
            },
            Place(2, 4, 0, 2),
        ),
    ],
)
def test_who_started_the_ranks_says_which_one_this_is(environment, place):
    assert place_of(environment | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}) == place


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK=one"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "MASTER_ADDR"),
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}, "MASTER_PORT"),
    ],
)
def test_an_environment_that_does_not_say(environment, word):
    with pytest.raises(UserError, match=word):
        place_of(environment)
