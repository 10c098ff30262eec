"""Ranks as processes forked from one that has imported everything, in the environment that torchrun would give them."""

import os
import signal
import socket
import sys
import time
from contextlib import chdir
from pathlib import Path

import all_stages  # noqa: F401 - what the processes begin with
import casp_eval.compare
import casp_eval.perplexity
import casp_eval.questions  # noqa: F401
import torch
from small_stages import SMALL

from casp.cli import pick_device, run_main
from casp.errors import UserError
from casp.ranks import Message, here

Outcome = tuple[int, str, str]
"""Exit status, what was printed, and what was printed as errors."""


class Started:
    """Ranks that are running; what each prints goes to files in `folder`."""

    def __init__(self, context, folder: Path, size: int, work, *args) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder = folder
        for rank in range(size):
            for kind in ("out", "err"):
                (folder / f"{rank}.{kind}").touch()  # a rank may be ended before it has begun
        self.processes = [
            context.Process(target=_as_rank, args=(rank, size, port, folder, work, args)) for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def ended(self, timeout: float = 120, by_torchrun: bool = True) -> list[Outcome]:
        """The outcome of each rank; all but those that were stopped end in time.

        by_torchrun: as torchrun does, tell the others to end when one has ended badly.
        """
        until = time.monotonic() + timeout
        while time.monotonic() < until and any(process.exitcode is None for process in self._going()):
            if by_torchrun and any(process.exitcode for process in self.processes):
                by_torchrun = False
                for process in self.processes:
                    process.terminate()
            time.sleep(0.05)
        running = [process.pid for process in self._going() if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        ranks = range(len(self.processes))
        texts = [[(self.folder / f"{rank}.{kind}").read_text() for kind in ("out", "err")] for rank in ranks]
        assert not running, (running, texts)
        return [(process.exitcode, *text) for process, text in zip(self.processes, texts, strict=True)]

    def _going(self) -> list:
        """Those that were not stopped."""
        return [process for process in self.processes if not _is_stopped(process.pid)]


def _is_stopped(pid: int) -> bool:
    """Whether a process stands still after SIGSTOP."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False  # it has ended


def _as_rank(rank: int, size: int, port: int, folder: Path, work, args: tuple) -> None:
    os.setsid()
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in (place | meeting).items()})
    try:
        run_main(lambda: work(*args), shared=work is not not_shared)
    finally:
        sys.stdout.flush()


def moments(model: Path, text: Path, root: Path) -> None:
    """Five batches: of two ranks and of three some have more than others."""
    from casp.moments.__main__ import main

    flags = ["--model", str(model), "--dataset", str(text), *SMALL, "--samples", "10", "--from-original"]
    main([*flags, "--token-weights", "none", "attention", "gradient", "--output", str(root / "out")])


def _collected(model: Path, text: Path) -> list[str]:
    """Flags that name the model, with moments that are collected once, beside it, before any rank starts."""
    place = model.parent / "collected"
    if not (place / "out").exists():
        moments(model, text, place)
    return ["--model", str(model), "--moments", str(place / "out"), "--device", "cpu"]


def gptq(model: Path, text: Path, root: Path) -> None:
    from casp_gptq.__main__ import main

    flags = ["--from-original", "--group-size", "32", "--bits", "4", "--export", "gptq"]
    main([*_collected(model, text), *flags, "--output", str(root / "out")])


def quip(model: Path, text: Path, root: Path) -> None:
    from casp_quip_sharp.__main__ import main

    flags = ["--from-original", "--sweeps", "0", "--ft-epochs", "0"]
    main([*_collected(model, text), *flags, "--output", str(root / "out")])


def _tuned(model: Path, text: Path, root: Path, *more: str) -> None:
    """Six steps of fine-tuning, of three batches each: of two ranks and of three some have more than others."""
    from casp_quip_sharp.__main__ import main

    data = ["--dataset", str(text), "--samples", "18", "--sequence-length", "16", "--batch-size", "3"]
    flags = ["--from-original", "--sweeps", "0", "--block-lr", "1e-2", "--e2e-lr", "1e-1"]
    main([*_collected(model, text), *data, *flags, *more, "--output", str(root / "out")])


def tuned_in_the_blocks(model: Path, text: Path, root: Path) -> None:
    _tuned(model, text, root, "--block-epochs", "1", "--e2e-epochs", "0")


def tuned_end_to_end(model: Path, text: Path, root: Path) -> None:
    _tuned(model, text, root, "--block-epochs", "0", "--e2e-epochs", "2")


def aqlm(model: Path, text: Path, root: Path) -> None:
    from casp_aqlm.__main__ import main

    flags = ["--from-original", "--scheme", "1x4g4", "--max-rounds", "1", "--ft-epochs", "0"]
    main([*_collected(model, text), *flags, "--output", str(root / "out")])


def svd(model: Path, text: Path, root: Path) -> None:
    from casp_svd.__main__ import main

    main([*_collected(model, text), "--whitening", "gradient", "--output", str(root / "out")])


def planned(model: Path, text: Path, root: Path) -> None:
    """Ranks and formats of a plan, by QuIP#; the recipe in the checkpoint names the plan as it is given."""
    from casp_quip_sharp.__main__ import main

    from casp.plan.__main__ import main as make_plan

    budget = ["--backend", "quip-sharp", "--bits", "2.5", "--format", "codebook=e8p"]
    root.mkdir(parents=True, exist_ok=True)
    with chdir(root):
        make_plan([*_collected(model, text), *budget, "--costs", "costs", "--output", "plan.json"])
        flags = ["--plan", "plan.json", "--sweeps", "0", "--ft-epochs", "0", "--output", "out"]
        main([*_collected(model, text), *flags])


def gptq_with_data(model: Path, text: Path, root: Path) -> None:
    """Without moments: each matrix sees what the quantized ones before it put out."""
    from casp_gptq.__main__ import main

    data = ["--dataset", str(text), *SMALL, "--samples", "10", "--token-weights", "attention"]
    flags = ["--model", str(model), "--group-size", "32", "--from-original", "--sweeps", "0", "--clip-search", "4"]
    main([*flags, *data, "--output", str(root / "out")])


def svd_with_data(model: Path, text: Path, root: Path) -> None:
    """Without moments: the attention is watched on the data, five batches."""
    from casp_svd.__main__ import main

    data = ["--dataset", str(text), *SMALL, "--samples", "10"]
    main(["--model", str(model), *data, "--output", str(root / "out")])


def perplexity(model: Path, text: Path, root: Path) -> None:
    from casp_eval.perplexity import main

    how = ["--sequence-length", "16", "--windows", "9", "--batch-size", "2", "--device", "cpu"]
    main(["--model", str(model), "--dataset", str(text), *how, "--output", str(root / "out.json")])


def compare(model: Path, text: Path, root: Path) -> None:
    """Of one model, whose perplexity is the figure; the report names its folder as it is given."""
    from casp_eval.compare import main

    root.mkdir(parents=True, exist_ok=True)
    with chdir(root):
        how = ["--sequence-length", "16", "--windows", "9", "--batch-size", "2", "--device", "cpu"]
        main([str(model), "--text", str(text), *how, "--output", "out"])


def divergence(model: Path, text: Path, root: Path) -> None:
    from casp_eval.divergence import main

    flags = ["--model", str(model), "--original", str(model), "--dataset", str(text), *SMALL, "--samples", "10"]
    main([*flags, "--output", str(root / "out.json")])


def questions(model: Path, asked: Path, root: Path) -> None:
    from casp_eval.questions import main

    how = ["--batch-size", "2", "--max-new-tokens", "3", "--device", "cpu"]
    main(["--model", str(model), "--dataset", str(asked), *how, "--output", str(root / "out.json")])


SHARED = {
    "compare": compare,
    "divergence": divergence,
    "perplexity": perplexity,
    "moments": moments,
    "GPTQ with export": gptq,
    "GPTQ without moments": gptq_with_data,
    "QuIP#": quip,
    "QuIP#, tuned in the blocks": tuned_in_the_blocks,
    "QuIP#, tuned end to end": tuned_end_to_end,
    "AQLM": aqlm,
    "SVD": svd,
    "SVD without moments": svd_with_data,
    "plan and QuIP#": planned,
}
"""What several ranks share, small; each writes to `ROOT/out`."""


def stage(name: str, *places: Path) -> None:
    """One of `SHARED`, or "questions"."""
    (SHARED | {"questions": questions})[name](*places)


def exchange(count: int) -> None:
    """Prints what the ranks tell each other, on rank 0."""
    ranks = here()
    found: list = []

    def away(item: int) -> Message:
        return Message({"item": item}, iter([torch.full((2,), item / 3), torch.empty(0, 5), torch.tensor([item])]))

    def absorb(message: Message) -> None:
        found.append([message.header["item"], *(tensor.tolist() for tensor in message.tensors)])

    ranks.in_order(range(count), lambda item: absorb(away(item)), away, absorb)
    whole = ranks.everywhere(Message(found, [torch.arange(3)]) if ranks.first else None)
    if whole.tensors[0].tolist() != [0, 1, 2]:
        raise UserError("what rank 0 found is not everywhere.")
    kinds = (torch.bfloat16, torch.bool, torch.int16, torch.uint8, torch.float64)
    tensors = [torch.tensor([1, 0, 3]).to(kind) for kind in kinds] + [torch.tensor(2.5), torch.ones(2, 3).T]
    last = ranks.size - 1
    others = ranks.everywhere(Message("of the last", tensors) if ranks.rank == last else None, last)
    if not all(map(torch.equal, others.tensors, tensors)):
        raise UserError("what the last rank found is not everywhere.")
    dealt = ranks.dealt([Message(rank, tensors) for rank in range(ranks.size)] if ranks.rank == last else None, last)
    if dealt.header != ranks.rank or not all(map(torch.equal, dealt.tensors, tensors)):
        raise UserError("what the last rank dealt out is not here.")
    told = [
        (message.header, [tensor.tolist() for tensor in message.tensors])  # read before the next one is asked for
        for message in ranks.at_first(Message(ranks.rank, tensors[:1]))
    ]
    print([rank for rank, values in told if values == [tensors[0].tolist()]])
    print(found if ranks.first else None)
    print(ranks.by_item([item * item for item in ranks.mine(count)]), ranks.told(lambda: ["of", ranks.rank]))


def not_shared() -> None:
    """A command that is one process by its nature."""


def on_one_gpu() -> None:
    """Names a GPU that all ranks would take."""
    pick_device("cuda:0")


def fails(how: str, rank: int) -> None:
    """Rank `rank`, or each where it is -1, ends badly while the others wait for it."""
    ranks = here()
    ranks.wait()
    if rank in (ranks.rank, -1):
        if how == "bad input":
            raise UserError("this cannot be used; give something else.")
        if how == "mistake":
            raise TypeError("nobody foresaw this")
        os.kill(os.getpid(), getattr(signal, how))
    ranks.wait()
