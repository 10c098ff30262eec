"""The long campaign: `python tests/hostile/campaign.py --random 1000 --output FILE.md` counts outcomes by class.

Every case runs a command line in a process of its own, forked from one that has imported everything, with a limit of
time, and is judged from outside: exit status, what it printed, its peak memory, what became of its input, and whether
what it wrote is finite.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}.items():
    os.environ.setdefault(name, value)

HERE = Path(__file__).resolve().parent
SECONDS, WAITING = 10, 60  # of its own time, which a busy machine does not stretch, and altogether
MOST_BYTES = 10**9
CLASSES = ("clean", "accepted", "unclear", "silent", "traceback", "crash", "hang", "memory", "damage", "executed")
"""clean: one sentence and status 2; accepted: status 0 where that is right; unclear: status 2 with more or less than
one sentence; silent: status 0 where it had to refuse, or numbers that are not finite in what it wrote; crash: ended by
a signal; memory: more than 1 GB above the process at rest; damage: its input changed; executed: the input's code ran.
"""
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
    "compress": "casp.compress",
    "obey": "casp_gptq.__main__",
    "obey quip": "casp_quip_sharp.__main__",
    "pictures": "casp_gptq.__main__",
    "perplexity": "casp_eval.perplexity",
    "questions": "casp_eval.questions",
    "chat": "casp_eval.chat",
    "compare": "casp_eval.compare",
    "speed": "casp_eval.speed",
}


def neighbour(name: str, path: Path) -> ModuleType:
    """A module of the tests, which are no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


cases = neighbour("hostile_cases", HERE / "cases.py")


@dataclass(frozen=True)
class Result:
    """What became of a case: its class, and the last line that it printed to stderr."""

    case: object
    outcome: str
    said: str
    seconds: float


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


def in_child(command: str, arguments: list[str], scratch: Path, stdin: bytes) -> tuple[int | None, int]:
    """Run a command line in a fork; its wait status (None: it ran out of time) and peak bytes."""
    (scratch / "stdin").write_bytes(stdin)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(scratch)
        for number, (name, flags) in enumerate(
            (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY | os.O_CREAT), ("stderr", os.O_WRONLY | os.O_CREAT))
        ):
            os.dup2(os.open(name, flags, 0o600), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - for this process's life
        used = int(time.process_time()) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (24 * 10**9, 24 * 10**9))
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**9, 10**9))
        os.environ["CASP_HOSTILE_MARK"] = str(scratch / "executed")
        status = 1
        try:
            run_command(command, arguments)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status)
    deadline = time.monotonic() + WAITING
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage.ru_maxrss * 1024
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.wait4(child, 0)
            return None, 0
        time.sleep(0.01)


def digest(folder: Path) -> str:
    """Over the names and contents of the regular files of a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size < 10**8 and not path.is_symlink():
            found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


def holds_only_finite(folder: Path) -> bool:
    """Whether all floating point tensors of what a stage wrote are finite."""
    import torch
    from safetensors.torch import load_file

    tensors = [t for file in folder.rglob("*.safetensors") for t in load_file(file).values()]
    return all(torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point())


def judge(case: object, status: int | None, peak: int, at_rest: int, scratch: Path, changed: bool) -> tuple[str, str]:
    """The class of an outcome, and what was said last."""
    said = (scratch / "stderr").read_text(errors="replace") if (scratch / "stderr").exists() else ""
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    errors = [line for line in lines if line.startswith("error: ")]
    if (scratch / "executed").exists():
        return "executed", last
    if changed:
        return "damage", last
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU)):
        return "hang", last
    if os.WIFSIGNALED(status):
        return "crash", f"signal {os.WTERMSIG(status)}: {last}"
    code = os.waitstatus_to_exitcode(status)
    if "Traceback" in said or code not in (0, 2, 3):
        return "traceback", last
    if peak - at_rest > MOST_BYTES:
        return "memory", f"{(peak - at_rest) / 1e9:.1f} GB: {last}"
    if code == 3 or (code == 0 and (case.refuse or not holds_only_finite(scratch))):
        return "silent", last
    if code == 0:
        return "accepted", last
    clean = len(errors) == 1 and lines[-1] == errors[0]
    return ("clean" if clean else "unclear"), last


def make_bases(folder: Path, run: Callable[[str, list[str]], None]) -> None:
    """The good inputs: a text model, a LLaVA, texts and pictures; what `run(command, arguments)` makes of the first."""
    from PIL import Image

    tests = neighbour("hostile_conftest", HERE.parent / "conftest.py")
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    tests.llama_checkpoint(making / "llama")
    tests.llava_checkpoint(making / "llava")
    data = making / "data"
    data.mkdir()
    (data / "text.txt").write_text("The quick brown fox jumps over the lazy dog, judge my vow. " * 60)
    rows = []
    for number in range(4):
        Image.new("RGB", (40, 40), (60 * number, 90, 200)).save(data / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "question": "What is this?", "answer": "a cat"}))
    (data / "questions.jsonl").write_text("\n".join(rows))
    made = {"gptq": "gptq", "quip": "quip", "aqlm": "aqlm", "svd": "svd", "hessians": "moments", "plan": "plan"}
    for name, command in made.items():
        flags = filled(cases.COMMANDS[command], making / "llama", making, making)
        output = making / name / "plan.json" if name == "plan" else making / name
        run(command, [*flags, *(["--costs", str(making / "costs")] if name == "plan" else []), "--output", str(output)])
    making.rename(folder)


def arguments_of(case: object) -> list[str]:
    """The flags of a case, those of its command first."""
    return ["{model}"] if case.command == "load" else [*cases.COMMANDS[case.command], *case.flags]


def filled(flags: Iterable[str], model: Path, scratch: Path, bases: Path) -> list[str]:
    """`flags` with paths in the place of {model}, {dir} and the like."""
    names = {
        "{model}": str(model),
        "{base}": str(bases / "llama"),
        "{dir}": str(scratch),
        "{moments}": str(bases / "hessians"),
        "{text}": str(bases / "data/text.txt"),
        "{questions}": str(bases / "data/questions.jsonl"),
    }
    found = []
    for flag in flags:
        for name, path in names.items():
            flag = flag.replace(name, path)
        found.append(flag)
    return found


class Campaign:
    """Small good inputs under `scratch`, and cases run on copies of them."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.bases = scratch / "bases"
        for module in {*MODULES.values(), "casp.data.sources", "transformers"}:
            importlib.import_module(module)
        import torch

        torch.set_num_threads(1)
        self._warm()
        if not self.bases.exists():
            make_bases(self.bases, self._run_or_fail)
        self.at_rest = 0
        calm = cases.Case("", "", "perplexity", "llama", cases.nothing, refuse=False)
        _, self.at_rest = self._run(calm, scratch / "calm")

    def _run_or_fail(self, command: str, arguments: list[str]) -> None:
        status, _ = in_child(command, arguments, self.scratch, b"")
        if status != 0:
            raise RuntimeError((self.scratch / "stderr").read_text())

    def _warm(self) -> None:
        """Fill this process's caches of imports and compiled loops, which its forks then share."""
        import torch
        from casp_quip_sharp.backend import QuipSharp

        QuipSharp().quantize(torch.randn(8, 8), torch.eye(8), {"bits": 2}, torch.Generator(), sweeps=1)

    def _run(self, case: object, scratch: Path) -> tuple[tuple[str, str], int]:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        model = scratch / "model"
        shutil.copytree(self.bases / case.base, model)
        case.damage(model)
        before = digest(model)
        arguments = filled(arguments_of(case), model, scratch, self.bases)
        status, peak = in_child(case.command, arguments, scratch, case.stdin)
        return judge(case, status, peak, self.at_rest, scratch, digest(model) != before), peak

    def run(self, case: object) -> Result:
        """Run one case and judge it."""
        scratch = self.scratch / "case"
        began = time.monotonic()
        (outcome, said), _ = self._run(case, scratch)
        if outcome == "hang":  # or this machine stood still: what hangs, hangs again
            (outcome, said), _ = self._run(case, scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        return Result(case, outcome, said, time.monotonic() - began)


def markdown(results: list[Result]) -> str:
    """Outcomes by group, as a table."""
    counts = Counter((result.case.group, result.outcome) for result in results)
    groups = list(dict.fromkeys(result.case.group for result in results))
    lines = [f"| class of input | cases | {' | '.join(CLASSES)} |", "|---|---:|" + "---:|" * len(CLASSES)]
    for group in [*groups, None]:
        row = [sum(n for (g, o), n in counts.items() if o == name and group in (g, None)) for name in CLASSES]
        cells = [str(count) if count else "" for count in row]
        lines.append(f"| {group or '**all**'} | {sum(row)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the tables and as many random cases as asked for; print counts, write them and what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True, help="folder for copies; kept bases are used again")
    parser.add_argument("--random", type=int, default=0, help="random cases besides the tables, a count")
    parser.add_argument("--seed", type=int, default=0, help="of the random cases")
    parser.add_argument("--groups", nargs="*", help="only these classes of the tables")
    parser.add_argument("--every", type=int, default=1, help="only each so-manieth case of the tables")
    parser.add_argument("--output", type=Path, help="file for the table of counts")
    args = parser.parse_args()
    campaign = Campaign(args.scratch.resolve())
    wanted = [case for case in cases.table() if not args.groups or case.group in args.groups][:: args.every]
    wanted += cases.random_cases(args.random, args.seed)
    results = []
    for case in wanted:
        results.append(campaign.run(case))
        if args.output:
            args.output.write_text(markdown(results))
        last = results[-1]
        if last.outcome not in ("clean", "accepted"):
            print(f"{last.outcome:9} {case.group} [{case.command}] {case.name}: {last.said[:200]}", flush=True)
    print(markdown(results))


if __name__ == "__main__":
    main()
