"""The long campaign: `python tests/hostile/campaign.py --random 1000 --output FILE.md` counts outcomes by class.

Every case runs a command line in a process of its own, forked from one that has imported everything (`--fresh`: started
anew, as a user's is), with a limit of time, and is judged from outside: exit status, what it printed, its peak memory,
what became of its input, and whether what it wrote is finite.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
import processes

for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}.items():
    os.environ.setdefault(name, value)

HERE = Path(__file__).resolve().parent
MOST_BYTES = 10**9
CLASSES = ("clean", "accepted", "unclear", "silent", "traceback", "crash", "hang", "memory", "damage", "executed")
"""clean: one sentence and status 2; accepted: status 0 where that is right; unclear: status 2 with more or less than
one sentence; silent: status 0 where it had to refuse, or numbers that are not finite in what it wrote; crash: ended by
a signal; memory: more than 1 GB above the process at rest; damage: its input changed; executed: the input's code ran.
"""


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


def holdings(folder: Path) -> dict[str, str]:
    """Names and hashes of the regular files in a folder, and the names of folders in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() and not path.is_symlink():
            found[name + "/"] = ""
        elif path.is_file() and path.stat().st_size < 10**8 and not path.is_symlink():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def damaged(before: dict[str, str], after: dict[str, str]) -> bool:
    """Whether anything that was there is no longer what it was, or the folder `model` holds more than it did."""
    more = after.keys() - before.keys()
    return not before.items() <= after.items() or any(name.startswith("model/") for name in more)


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
        "{costs}": str(bases / "costs"),
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

    def __init__(self, scratch: Path, fresh: bool = False) -> None:
        self.scratch, self.fresh = scratch, fresh
        self.bases = scratch / "bases"
        for module in {*processes.MODULES.values(), "casp.data.sources", "transformers"}:
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
        status, _ = processes.in_child(command, arguments, self.scratch, b"")
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
        before = holdings(scratch)
        arguments = filled(arguments_of(case), model, scratch, self.bases)
        status, peak = processes.in_child(case.command, arguments, scratch, case.stdin, self.fresh)
        return judge(case, status, peak, self.at_rest, scratch, damaged(before, holdings(scratch))), peak

    def run(self, case: object) -> Result:
        """Run one case and judge it."""
        scratch = self.scratch / "case"
        (outcome, said), _ = self._run(case, scratch)
        if outcome == "hang":  # or this machine stood still: what hangs, hangs again
            (outcome, said), _ = self._run(case, scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        return Result(case, outcome, said)


def markdown(results: list[Result]) -> str:
    """Outcomes by group, as a table."""
    counts = Counter((result.case.group, result.outcome) for result in results)
    met = {group for group, _ in counts}
    groups = [group for group in [*dict.fromkeys(case.group for case in cases.table()), "random"] if group in met]
    lines = [f"| class of input | cases | {' | '.join(CLASSES)} |", "|---|---:|" + "---:|" * len(CLASSES)]
    for group in [*groups, None]:
        row = [sum(n for (g, o), n in counts.items() if o == name and group in (g, None)) for name in CLASSES]
        cells = [str(count) if count else "" for count in row]
        lines.append(f"| {group or '**all**'} | {sum(row)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def named(found: Iterable[object]) -> dict[str, object]:
    """Cases by a name that is each's alone."""
    names: Counter = Counter()
    result = {}
    for case in found:
        name = f"{case.group} [{case.command}] {case.name}"
        names[name] += 1
        result[f"{name} #{names[name]}" if names[name] > 1 else name] = case
    return result


def recorded(file: Path, wanted: dict[str, object]) -> dict[str, Result]:
    """What earlier runs have written to `file` of the cases that are wanted now."""
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {name: Result(wanted[name], *rest) for name, *rest in lines if name in wanted}


def main() -> None:
    """Run the tables and as many random cases as asked for; print counts, write them and what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True, help="folder for copies; kept bases are used again")
    parser.add_argument("--random", type=int, default=0, help="random cases besides the tables, a count")
    parser.add_argument("--seed", type=int, default=0, help="of the random cases and the order")
    parser.add_argument("--groups", nargs="*", help="only these classes")
    parser.add_argument("--commands", nargs="*", help="only these commands, of those in case.py")
    parser.add_argument("--part", default="1/1", help="1/3: the first third of the cases, for several processes")
    parser.add_argument("--fresh", action="store_true", help="each case in a process that imports everything itself")
    parser.add_argument("--record", type=Path, help="file for what became of each case, which is then not run again")
    parser.add_argument("--output", type=Path, help="file for the table of counts, of all that is in the record")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    wanted = named([*cases.table(), *cases.random_cases(args.random, args.seed)])
    wanted = {name: case for name, case in wanted.items() if not args.groups or case.group in args.groups}
    wanted = {name: case for name, case in wanted.items() if not args.commands or case.command in args.commands}
    order = random.Random(args.seed).sample(sorted(wanted), len(wanted))  # what was run when it is stopped is a sample
    record = args.record or args.scratch / "record.jsonl"
    todo = [name for name in order[part - 1 :: parts] if name not in recorded(record, wanted)]
    campaign = Campaign(args.scratch.resolve(), args.fresh) if todo else None
    for name in todo:
        result = campaign.run(wanted[name])
        with record.open("a") as file:
            file.write(json.dumps([name, result.outcome, result.said[:300]]) + "\n")
    results = recorded(record, wanted)
    for name, result in results.items():
        if result.outcome not in ("clean", "accepted"):
            print(f"{result.outcome:9} {name}: {result.said[:200]}", flush=True)
    if args.output:
        args.output.write_text(markdown(list(results.values())))
    print(markdown(list(results.values())))


if __name__ == "__main__":
    main()
