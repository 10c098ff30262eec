"""CASP-X against X at equal bytes, for every backend and codebook: `python -m casp_eval.casp_vs_baseline --output DIR`.

For each model, calibration seed, backend, codebook, budget and allocation: moments, prices, plan, quantizing,
evaluation, each by the stage's own command. A row is kept as soon as it is known (DIR/rows), and so are moments and
prices, while the checkpoints are removed once they are evaluated: run again to resume.
"""

import argparse
import gc
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from casp.backend import backend_names, load_backend
from casp.cli import Parser, add_device_arguments, model_folder, run_main
from casp.data.chats import Chat, chats_fingerprint
from casp.data.sources import evaluation_chats, evaluation_text
from casp.errors import UserError
from casp.job import package_of, tunes
from casp.model.checkpoint import size
from casp.model.decoder import Decoder
from casp.model.modality import is_multimodal
from casp.numbers import real, whole
from casp.numbers import seed as any_seed
from casp.plan.file import shapes
from casp.plan.options import chosen_formats
from casp.reading.documents import read_json
from casp.run.files import write_json
from casp.run.outputs import check_folder, check_report, make_output, refuse_inputs
from casp_eval.compare import Evaluation, Figures, Subject
from casp_eval.options import Scoring, add_batch_argument, add_text_arguments
from casp_eval.versus_report import MEASURES, write_report

ROUNDED_BITS = (2.05, 2.25, 2.5, 3.0)
TUNED_BITS = 2.05
CASP, BASELINE = "optimal", "uniform"
ABLATION = ("optimal", "optimal, full rank", "ranks", "paper", "paper, full rank", "paper-ranks")
"""Ranks and bits, bits only, ranks only, and the paper's version of each."""

COLUMNS = {"model", "backend", "codebook", "allocation", "tuned", "casp", "bits", "bpw", "seed", *MEASURES}
CALIBRATION = {"demo-llama": ("demo-speeches", 32), "demo-llava": ("demo-mixed", 208)}
"""The models of the table, and what each is calibrated on: a set and how many samples of it. demo-llama's is what the
aims of its figures were set on, not the default."""
LONGEST_ANSWER = 4  # tokens


@dataclass(frozen=True)
class Setting:
    """What one row measures."""

    model: str
    backend: str
    codebook: str | None
    allocation: str
    tuned: bool
    bits: float
    seed: int

    def name(self) -> str:
        """What its files are called."""
        parts = (self.model, self.backend, self.codebook, self.allocation.replace(", ", "-").replace(" ", "-"))
        tuned = "tuned" if self.tuned else "rounded"
        return "-".join([*filter(None, parts), tuned, f"{self.bits:g}", f"seed{self.seed}"])


def codebooks(backend: str) -> list[str | None]:
    """The codebooks that a backend offers; [None] where it does not speak of them."""
    return list(getattr(load_backend(backend), "codebooks", [None]))


def reaches(setting: Setting) -> bool:
    """Whether the backend can store every linear at full rank within the budget: without that there is no baseline."""
    backend, decoder = load_backend(setting.backend), Decoder(model_folder(setting.model))
    wanted = {"codebook": setting.codebook} if setting.codebook else {}
    least = 0
    for shape in shapes(decoder).values():
        formats = chosen_formats(backend, *shape, setting.tuned, wanted)
        least += backend.bytes(formats[0], *shape)
    return 8 * least <= setting.bits * decoder.original_weights()


@dataclass(frozen=True)
class Grid:
    """Which rows are asked for: of these models, backends, budgets (bits a weight) and seeds; the first budget and seed
    serve for the ablation, the first seed for the tuned. codebooks: those of the backends that have some; none: all.
    UserError on a codebook that no backend of the grid offers.
    """

    models: tuple[str, ...]
    backends: tuple[str, ...]
    bits: tuple[float, ...]
    seeds: tuple[int, ...]
    ablation: bool
    tuned: bool
    codebooks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.codebooks:
            offered = {one for backend in self.backends for one in codebooks(backend) if one is not None}
            if strange := sorted(set(self.codebooks) - offered):
                raise UserError(
                    f"--codebooks: {', '.join(map(repr, strange))} is a codebook of none of the backends "
                    f"{', '.join(self.backends)}; they offer {', '.join(sorted(offered)) or 'none'}."
                )

    def kinds(self) -> list[tuple[str, str | None]]:
        """Backend and codebook of the quantizers that are asked for."""
        every = [(backend, codebook) for backend in self.backends for codebook in codebooks(backend)]
        return [(backend, one) for backend, one in every if one is None or not self.codebooks or one in self.codebooks]


@dataclass(frozen=True)
class Making:
    """How checkpoints are made: on what device, from how many samples (0: CALIBRATION) in batches of what size, and how
    many epochs a fine-tuning takes.
    """

    device: str
    samples: int
    batch_size: int
    epochs: int


def settings(grid: Grid) -> Iterator[Setting]:
    """All rows, the most telling first: pairs of CASP and baseline by budget, then the ablation, then the tuned."""
    kinds = grid.kinds()
    for seed in grid.seeds:
        for model in grid.models:
            for backend, codebook in kinds:
                for bits in grid.bits:
                    for allocation in (BASELINE, CASP):
                        yield Setting(model, backend, codebook, allocation, False, bits, seed)
    if grid.ablation:
        for model in grid.models:
            for backend, codebook in kinds:
                for allocation in ABLATION:
                    yield Setting(model, backend, codebook, allocation, False, grid.bits[0], grid.seeds[0])
    if grid.tuned:
        for model in grid.models:
            for backend, codebook in kinds:
                if tunes(package_of(backend)):
                    for allocation in (BASELINE, CASP):
                        yield Setting(model, backend, codebook, allocation, True, TUNED_BITS, grid.seeds[0])


class Workshop:
    """Makes the checkpoint of a setting, reusing moments, prices and plans of others."""

    def __init__(self, folder: Path, making: Making) -> None:
        self.folder, self.making = folder, making

    def _run(self, module: str, *flags: object) -> None:
        command = [sys.executable, "-m", module, *map(str, flags), "--device", self.making.device]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command[1:])} ended with status {done.returncode}; mend that and run again.")

    def _data(self, setting: Setting) -> list[object]:
        dataset, samples = CALIBRATION[setting.model]
        return [
            "--dataset",
            dataset,
            "--samples",
            self.making.samples or samples,
            "--seed",
            setting.seed,
            "--batch-size",
            self.making.batch_size,
        ]

    def moments(self, setting: Setting) -> Path:
        """Of the model and the seed."""
        folder = self.folder / f"{setting.model}-seed{setting.seed}-moments"
        if not folder.exists():
            flags = ["--model", setting.model, *self._data(setting), "--from-original"]
            self._run("casp.moments", *flags, "--output", folder)
        return folder

    def plan(self, setting: Setting) -> Path:
        """The plan of a setting, from prices that all budgets and allocations share."""
        file = self.folder / f"{setting.name()}-plan.json"
        if not file.exists():
            kind = "-".join(filter(None, (setting.backend, setting.codebook, "tuned" if setting.tuned else None)))
            allocation, _, full_rank = setting.allocation.partition(", ")
            flags: list[object] = ["--model", setting.model, "--backend", setting.backend, "--bits", setting.bits]
            flags += ["--format", f"codebook={setting.codebook}"] if setting.codebook else []
            flags += ["--tuned"] if setting.tuned else []
            flags += ["--allocation", allocation, *(["--no-low-rank"] if full_rank else [])]
            costs = self.folder / f"{setting.model}-seed{setting.seed}-{kind}-costs"
            self._run("casp.plan", *flags, "--moments", self.moments(setting), "--costs", costs, "--output", file)
        return file

    def checkpoint(self, setting: Setting) -> Path:
        """The quantized model."""
        folder = self.folder / setting.name()
        check_folder(folder, flag="--work")  # it is removed afterwards
        if not folder.exists():
            package = package_of(setting.backend)
            flags: list[object] = ["--model", setting.model, *self._data(setting), "--plan", self.plan(setting)]
            flags += ["--moments", self.moments(setting), "--output", folder]
            if tunes(package):
                flags += ["--ft-epochs", self.making.epochs if setting.tuned else 0]
            self._run(package, *flags)
        return folder


class Examiner:
    """Measures checkpoints, and the original of each model once."""

    def __init__(self, folder: Path, scoring: Scoring, questions: int) -> None:
        self.scoring, self.figures, self.asked = scoring, Figures(folder / "figures"), questions
        self.texts = {"text": evaluation_text("test"), "other_text": evaluation_text("moby")}
        self.questions = {}

    def measure(self, name: str) -> dict[str, float | None]:
        """Bpw aside, what a row holds, with perplexities in place of their excess."""
        one = Evaluation(Subject.parse(name), self.figures, self.scoring)
        found: dict[str, float | None] = {
            f"log_{what}": math.log(one.text(text)["perplexity"]) for what, text in self.texts.items()
        }
        found |= dict.fromkeys(("answer_perplexity", "accuracy", "accuracy_unseen"))
        if is_multimodal(one.config):
            seen, unseen = self._questions("test"), self._questions("test-unseen")
            found["answer_perplexity"] = one.answer_perplexity(*seen)["perplexity"]
            found["accuracy"] = one.accuracy(*seen)["accuracy"]
            found["accuracy_unseen"] = one.accuracy(*unseen)["accuracy"]
        one.opened = None
        gc.collect()
        return found

    def _questions(self, split: str) -> tuple[list[Chat], str]:
        if split not in self.questions:
            items = evaluation_chats(split, self.asked, 0)
            self.questions[split] = (items, chats_fingerprint(items))
        return self.questions[split]


def row(setting: Setting, folder: Path, examiner: Examiner) -> dict[str, Any]:
    """The row of a setting whose checkpoint lies in `folder`."""
    original, found = examiner.measure(setting.model), examiner.measure(str(folder))
    return {
        **{key: value for key, value in asdict(setting).items() if key not in ("bits", "seed")},
        "casp": setting.allocation != BASELINE,
        "bits": setting.bits,
        "bpw": size(folder).bpw,
        "seed": setting.seed,
        "excess_text": found["log_text"] - original["log_text"],
        "excess_other_text": found["log_other_text"] - original["log_other_text"],
        "answer_perplexity": found["answer_perplexity"],
        "accuracy": found["accuracy"],
        "accuracy_unseen": found["accuracy_unseen"],
    }


def kept_row(file: Path, setting: Setting) -> dict[str, Any]:
    """The row of `setting` that was measured before; UserError where `file` holds none, or one of another setting."""
    found = read_json(file, "the row", remedy="remove it to measure it again")
    measured = [found.get(name) for name in ("bpw", *MEASURES)]
    known = [value for value in measured if value is not None]  # a text model answers no questions
    numbers = all(type(value) in (int, float) and math.isfinite(value) for value in known)
    alike = all(found.get(name) == value for name, value in asdict(setting).items())
    if not found.keys() >= COLUMNS or measured[0] is None or not numbers or not alike:
        raise UserError(f"{file} holds no row of {setting.name()}; remove it to measure it again.")
    return found


def kept_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows that were measured into `folder`, also those that this command did not ask for; UserError as above."""
    names = [field.name for field in fields(Setting)]
    rows = []
    for file in sorted(folder.glob("*-seed*.json")):
        found = read_json(file, "the row", remedy="remove it to measure it again")
        setting = Setting(*(found.get(name) for name in names))
        try:
            known = file.name == f"{setting.name()}.json"
        except (TypeError, ValueError, AttributeError):
            known = False
        if not known:
            raise UserError(f"{file} holds no row of that name; remove it to measure it again.")
        rows.append(kept_row(file, setting))
    return rows


def of_work(making: Making) -> dict[str, Any]:
    """What the files of a workshop share."""
    batch_size, epochs = making.batch_size, making.epochs
    data = {name: f"{dataset}@{samples}" for name, (dataset, samples) in CALIBRATION.items()}
    return {"calibration": data, "samples": making.samples, "calibration_batch_size": batch_size, "epochs": epochs}


def of_rows(making: Making, scoring: Scoring, questions: int) -> dict[str, Any]:
    """What the rows of one table share: data and questions."""
    how = {"windows": scoring.windows, "sequence_length": scoring.sequence_length, "dtype": scoring.dtype}
    return {**of_work(making), **how, "questions": questions}


def check_alike(file: Path, wanted: dict[str, Any], flag: str) -> None:
    """UserError where what lies beside `file`, in the folder of `flag`, was made with another setting than `wanted`."""
    if not file.exists():
        write_json(file, wanted)
        return
    found = read_json(file, "what the files beside it share", remedy=f"choose another {flag}")
    other = next((name for name, value in wanted.items() if found.get(name) != value), None)
    if other is not None:
        raise UserError(
            f"what lies in {file.parent} was made with {other} {str(found.get(other))[:80]}, not {wanted[other]}; "
            f"give the same or choose another {flag}."
        )


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="casp_vs_baseline.sh",
        description="CASP-X against X at equal bytes; table, plots and report.json. Run again to resume.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the report and the kept rows")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/casp_vs_baseline"), help="moments, prices, plans (default: %(default)s)"
    )
    parser.add_argument(
        "--models", nargs="+", choices=CALIBRATION, default=list(CALIBRATION), help="built-in models (default: all)"
    )
    parser.add_argument(
        "--backends", nargs="+", choices=backend_names(), default=backend_names(), help="quantizers (default: all)"
    )
    parser.add_argument(
        "--codebooks", nargs="+", default=[], metavar="NAME", help="of the backends that have some (default: all)"
    )
    parser.add_argument(
        "--bits",
        type=real(0, 16),
        nargs="+",
        default=list(ROUNDED_BITS),
        help="budgets, bits a weight (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=any_seed,
        nargs="+",
        default=[0, 1, 2],
        help="seeds of calibration and rounding (default: %(default)s)",
    )
    on_off = argparse.BooleanOptionalAction
    parser.add_argument("--ablation", action=on_off, default=True, help="low rank, bits, the paper's (default: on)")
    parser.add_argument("--tuned", action=on_off, default=True, help="also with both fine-tunings (default: on)")
    parser.add_argument("--epochs", type=whole(1), default=2, help="of each fine-tuning (default: %(default)s)")
    parser.add_argument(
        "--samples",
        type=whole(0),
        default=0,
        help="calibration samples (default: 0 = 32 texts, or 192 chats and 16 texts)",
    )
    parser.add_argument(
        "--calibration-batch-size", type=whole(1), default=2, help="samples run at once (default: %(default)s)"
    )
    parser.add_argument("--questions", type=whole(0), default=600, help="of each split (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints (default: remove them)")
    add_text_arguments(parser)
    add_batch_argument(parser)
    add_device_arguments(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, then write the report over all rows."""
    args = build_parser().parse_args(arguments)
    rows_folder = args.output / "rows"
    plots = [f"{model}.png" for model in CALIBRATION]
    check_report(args.output, ("report.json", "report.md", *plots), [], "report.json", COLUMNS)
    refuse_inputs(args.work, [], "--work")
    grid = Grid(
        *(tuple(values) for values in (args.models, args.backends, args.bits, args.seeds)),
        args.ablation,
        args.tuned,
        tuple(args.codebooks),
    )
    for folder, flag in ((rows_folder, "--output"), (args.work, "--work")):
        make_output(folder, flag)
    making = Making(args.device, args.samples, args.calibration_batch_size, args.epochs)
    workshop = Workshop(args.work, making)
    scoring = Scoring(args.device, args.dtype, args.windows, args.sequence_length, args.batch_size, LONGEST_ANSWER)
    check_alike(rows_folder / "shared.json", of_rows(making, scoring, args.questions), "--output")
    check_alike(args.work / "shared.json", of_work(making), "--work")
    examiner = Examiner(args.output, scoring, args.questions)
    write_report(args.output, kept_rows(rows_folder))
    for setting in dict.fromkeys(settings(grid)):
        file = rows_folder / f"{setting.name()}.json"
        if not file.exists():
            if not reaches(setting):
                print(f"{setting.backend} does not reach {setting.bits:g} bits on {setting.model}: left out")
                continue
            print(f"== {setting.name()}", flush=True)
            folder = workshop.checkpoint(setting)
            write_json(file, row(setting, folder, examiner))
            if not args.keep:
                shutil.rmtree(folder)
        write_report(args.output, kept_rows(rows_folder))
    print((args.output / "report.md").read_text())


if __name__ == "__main__":
    run_main(main)
