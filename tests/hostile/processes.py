"""Command lines in processes of their own, with limits: forked from this one, or started anew as a user's are."""

import importlib
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

SECONDS = 10  # of its own time, which a busy machine does not stretch
IDLE, WAITING = 20, 600  # seconds without any of its own time, and altogether
START_UP = 60  # of a fresh process, besides
MODULES = {
    "svd": "casp_svd.__main__",
    "gptq": "casp_gptq.__main__",
    "quip": "casp_quip_sharp.__main__",
    "tuned": "casp_quip_sharp.__main__",
    "given": "casp_quip_sharp.__main__",
    "moments": "casp.moments.__main__",
    "aqlm": "casp_aqlm.__main__",
    "plan": "casp.plan.__main__",
    "priced": "casp.plan.__main__",
    "compress": "casp.job",
    "obey": "casp_gptq.__main__",
    "obey quip": "casp_quip_sharp.__main__",
    "pictures": "casp_gptq.__main__",
    "perplexity": "casp_eval.perplexity",
    "questions": "casp_eval.questions",
    "chat": "casp_eval.chat",
    "compare": "casp_eval.compare",
    "speed": "casp_eval.speed",
    "predicted": "casp_eval.predicted",
    "prices": "casp_eval.predicted",
    "plan of prices": "casp.plan.__main__",
    "divergence": "casp_eval.divergence",
    "original": "casp_eval.divergence",
    "ranks": "casp_eval.ranks_and_density",
    "mix": "casp_eval.calibration_mix",
    "versus": "casp_eval.casp_vs_baseline",
}


def load_folder(folder: Path) -> None:
    """The command "load": from_pretrained, the door of our checkpoints outside of our own command lines."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits = model(torch.arange(4, 36)[None]).logits
    except Exception as error:  # any error is a refusal here
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    if not torch.isfinite(logits).all():
        print("the logits are not finite", file=sys.stderr)
        raise SystemExit(3)


def run_command(command: str, arguments: list[str]) -> None:
    """Run a command line in this process; ends it."""
    from casp.cli import run_main

    if command == "load":
        load_folder(Path(arguments[0]))
        raise SystemExit(0)
    main = importlib.import_module(MODULES[command]).main
    sys.argv = [command, *arguments]
    run_main(main)


def _become(command: str, arguments: list[str], scratch: Path, fresh: bool) -> None:
    """What the child does: its own session, folder, streams and limits, then the command line; ends the process."""
    status = 1
    try:
        os.setsid()
        os.chdir(scratch)
        writing = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        for number, (name, flags) in enumerate((("stdin", os.O_RDONLY), ("stdout", writing), ("stderr", writing))):
            os.dup2(os.open(name, flags, 0o600), number)
        seconds = (START_UP if fresh else int(time.process_time()) + 1) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (24 * 10**9, 24 * 10**9))
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**9, 10**9))
        os.environ["CASP_HOSTILE_MARK"] = str(scratch / "executed")
        if fresh:
            os.execv(sys.executable, [sys.executable, __file__, command, *arguments])
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - for its life
        run_command(command, arguments)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _own_seconds(process: int) -> float:
    """Processor time that a running process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_child(
    command: str, arguments: list[str], scratch: Path, stdin: bytes, fresh: bool = False
) -> tuple[int | None, int]:
    """Run a command line in a fork; its wait status (None: it stood still or ran out of time) and peak bytes."""
    (scratch / "stdin").write_bytes(stdin)
    child = os.fork()
    if child == 0:
        _become(command, arguments, scratch, fresh)
    began = moved = time.monotonic()
    used = -1.0
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage.ru_maxrss * 1024  # a fork begins with what its parent holds, not with its peak
        now = time.monotonic()
        if (spent := _own_seconds(child)) != used:
            used, moved = spent, now
        if now - moved > IDLE or now - began > WAITING:
            os.killpg(child, signal.SIGKILL)
            os.wait4(child, 0)
            return None, 0
        time.sleep(0.02)


if __name__ == "__main__":  # what `fresh` starts
    run_command(sys.argv[1], sys.argv[2:])
