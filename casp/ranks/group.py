"""Opening and closing the process group that torchrun, accelerate or SLURM started this process for."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from casp.errors import UserError, in_brief, told_as
from casp.ranks.exchange import ALONE, LostContact, Ranks
from casp.ranks.watch import Watch

LONGEST_WAIT = timedelta(hours=12)  # of a message for its reader: who is alive may take long over a wide block
THREADS = "OMP_NUM_THREADS"
_HERE: ContextVar[Ranks] = ContextVar("casp ranks", default=ALONE)

Ending = Callable[[BaseException], tuple[str, int] | None]
"""What to say of an error that ends a rank, and its exit status; None for what nobody foresaw."""


@dataclass(frozen=True)
class Place:
    """Number `rank` of `size` processes, `local` of `beside` on its machine."""

    rank: int
    size: int
    local: int
    beside: int


_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # of torchrun and accelerate
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")


def place_of(environment: Mapping[str, str]) -> Place | None:
    """Which of several processes this one is; None for one alone. UserError for an environment that does not say."""
    if environment.get("WORLD_SIZE"):
        names = _NAMES
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1" and environment.get("SLURM_PROCID"):
        names = _SLURM  # of a step that srun started; the script of sbatch itself is one process
    else:
        return None
    numbers = []
    for name, default in zip(names, ("0", "1", "0", "1"), strict=True):
        word = environment.get(name, default).partition("(")[0].partition(",")[0]  # SLURM writes 4(x2) for 4, 4
        if not word.isdecimal():
            raise UserError(f"{name}={environment[name]} is no whole number; start the ranks by torchrun or srun.")
        numbers.append(int(word))
    place = Place(*numbers)
    if place.size == 1:
        return None
    if place.rank >= place.size:
        raise UserError(f"{names[0]}={place.rank} is none of {place.size} ranks; start them by torchrun or srun.")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise UserError(
            f"{place.size} ranks were started and {missing[0]} is not set, which tells them where to meet; set "
            "MASTER_ADDR to the first host and MASTER_PORT to a free port there."
        )
    return place


def here() -> Ranks:
    """This process among those of the run: `ALONE` outside `opened`."""
    return _HERE.get()


@contextmanager
def opened(ending: Ending, tell: Callable[[str], None], shared: bool = True) -> Iterator[Ranks]:
    """Inside the block this process is one of the ranks that the environment tells of; all but rank 0 are silent.

    ending: words and status of an error that is told, None of one that is a mistake of ours; tell: prints a sentence;
    shared: whether the command can be shared out, else several ranks are a UserError. An error ends all ranks.
    """
    place = place_of(os.environ)
    if place is None:
        yield ALONE
        return
    if not shared:
        if place.rank:
            raise SystemExit(2)  # rank 0 says why
        raise UserError(
            f"this command is one process, and {place.size} ranks of it were started; start it alone: with "
            "CASP_PROCESSES set it starts what can be shared out itself."
        )
    ranks, watch = _open(place, tell)
    token = _HERE.set(ranks)
    try:
        with _silent(place.rank > 0):
            yield ranks
        watch.leave()
    except LostContact:
        watch.lost_contact()
        raise
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            watch.leave()
            raise
        watch.fail(*_words(error, ending))
        if place.rank and ending(error) is not None:
            raise SystemExit(_words(error, ending)[1]) from None  # rank 0 has said it
        raise
    finally:
        _HERE.reset(token)
    dist.destroy_process_group()


def _words(error: BaseException, ending: Ending) -> tuple[str, int]:
    """What follows "rank 1 on HOST" where that rank ended so, and the exit status."""
    told = ending(error)
    if told is not None:
        return f": {told[0].removeprefix('error: ')}", told[1]
    if isinstance(error, SystemExit):
        return f" ended with status {error.code}.", error.code if isinstance(error.code, int) else 1
    return f" failed ({type(error).__name__}: {in_brief(error)}); its own words are above.", 1


def _open(place: Place, tell: Callable[[str], None]) -> tuple[Ranks, Watch]:
    """Meet the other ranks; threads and GPUs of a machine are shared out among those on it."""
    if THREADS not in os.environ:
        torch.set_num_threads(max(1, cores() // place.beside))
    gpus = torch.cuda.device_count()
    direct = 0 < place.beside <= gpus  # nccl takes one rank a GPU
    if gpus:
        torch.cuda.set_device(place.local % gpus)
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    with told_as(f"{place.size} ranks did not meet at {where}", "check the address, and that all of them were started"):
        store, _, _ = next(dist.rendezvous("env://", rank=place.rank, world_size=place.size))
        watch = Watch(dist.PrefixStore("casp watch", store.clone()), place.rank, place.size, tell)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if direct else "gloo",
            store=dist.PrefixStore("casp group", store),
            rank=place.rank,
            world_size=place.size,
            timeout=LONGEST_WAIT,
        )
    watch.start()
    return Ranks(place.rank, place.size, dist.PrefixStore("casp", store.clone()), direct), watch


def cores() -> int:
    """How many of this machine's cores the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    """Inside the block, where `wanted`, nothing is printed; a mistake of ours is, behind it."""
    if not wanted:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
