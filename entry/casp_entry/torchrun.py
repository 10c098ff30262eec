"""`python -m casp_entry.torchrun -m MODULE ...`: as torchrun with CASP_PROCESSES ranks on this machine, for users.

torchrun starts the ranks, watches them and ends all where one ends. What is added are the numbers of processes and of
threads, and that a failure is the sentence and exit status of the rank that failed, without torchrun's own report.
A command that is one process by its nature is started as that.
"""

import logging
import os
import sys
from typing import NoReturn

PROCESSES, THREADS = "CASP_PROCESSES", "OMP_NUM_THREADS"
MOST = 1024
SHARED = {"casp.moments", "casp.plan"} | {
    f"casp_eval.{name}" for name in ("compare", "divergence", "perplexity", "questions")
}
"""Commands that several ranks share, besides the stages, each of which is a package's own."""


def is_shared(words: list[str]) -> bool:
    """Whether the command `-m MODULE ...` is one for several ranks: a stage, or a shared one of the core's."""
    module = words[1] if len(words) > 1 and words[0] == "-m" else ""
    stage = module.startswith("casp_") and "." not in module
    return module in SHARED or stage


def processes(word: str) -> int:
    """The number that CASP_PROCESSES holds; exits with one sentence and status 2 for anything else."""
    if not word.isascii() or not word.isdecimal() or not 1 <= int(word) <= MOST:
        print(f"error: {PROCESSES}={word[:40]} is no number of processes; give 1 to {MOST}.", file=sys.stderr)
        raise SystemExit(2)
    return int(word)


def main(words: list[str]) -> NoReturn:
    """Run the command in as many ranks as the environment asks for."""
    count = processes(os.environ.get(PROCESSES) or "1")
    if count == 1 or not is_shared(words):
        os.execv(sys.executable, [sys.executable, *words])
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault(THREADS, str(max(1, available // count)))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a store that ends before those who read it, say
    logging.disable(logging.CRITICAL)  # torchrun's own report of a rank that has said itself what is wrong
    where = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(count)]
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        run(parse_args([*where, *words]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0 and rank == 0:  # whose death nobody else tells
            print(
                f"error: rank 0 was killed by signal {-failure.exitcode} (9: for lack of memory?); the same command "
                "resumes, with any number of processes.",
                file=sys.stderr,
            )
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 1) from None
    except (SignalException, KeyboardInterrupt):
        raise SystemExit(130) from None  # rank 0 has said so
    raise SystemExit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
