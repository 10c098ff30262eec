"""Evaluate several checkpoints alike and report: `python -m casp_eval.compare CHECKPOINT... --output DIR`.

Every figure is kept in DIR/figures under the checkpoint's content and the settings it was measured with, as soon
as it is known: an interrupted comparison goes on where it stopped, a repeated one measures nothing, and neither
shows a figure of other weights.
"""

import argparse
import gc
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from casp.cli import Parser, add_device_arguments, compute_named, model_folder, model_name, run_main
from casp.data import sources
from casp.data.chats import Chat, chats_fingerprint
from casp.demo import NAMES
from casp.errors import UserError
from casp.model.checkpoint import size
from casp.model.modality import is_multimodal
from casp.ranks import ALONE, Ranks, here
from casp.reading.config import open_config, quantization_of
from casp.reading.documents import read_json
from casp.run.digest import file_digest
from casp.run.files import write_atomically, write_json
from casp.run.outputs import check_report, make_output
from casp.run.report import read_report
from casp_eval import plots, questions, report
from casp_eval.loading import Checkpoint, open_checkpoint
from casp_eval.options import Scoring, add_batch_argument, add_question_arguments, add_text_arguments
from casp_eval.perplexity import text_perplexity

REPORT_FILES = ("report.json", "report.md", *(f"{name}.png" for name in plots.FIGURES))

PROTOCOL = 1
"""Raise it when what a figure means changes: kept figures of an older protocol are then measured again."""

UNCALIBRATED = "encyclopaedia"
"""The test text of a register that no built-in calibration set holds: what calibration did not see."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint to be compared: as typed, where it lies, and the label given with NAME=FOLDER."""

    given: str
    folder: Path
    label: str | None

    @classmethod
    def parse(cls, text: str) -> "Subject":
        """NAME=CHECKPOINT or CHECKPOINT; a folder whose own name has an equals sign is taken as it is."""
        label, equals, given = text.partition("=")
        if not equals or Path(text).exists():
            return cls(text, model_folder(text), None)
        return cls(given, model_folder(given), label)


class Figures:
    """Measured figures on disk, one small JSON file each, addressed by what they depend on."""

    def __init__(self, folder: Path, ranks: Ranks = ALONE) -> None:
        """ranks: who measure each together, and of whom the first keeps it."""
        self.folder, self.ranks = folder, ranks

    def get(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figure kept under `key`, or the one that `measure` returns, kept from now on."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        path = self.folder / f"{key['figure']}-{name}.json"
        kept = self.ranks.told(lambda: self._kept(path, key))
        if kept is not None:
            return kept
        result = measure()
        if self.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"key": key, "result": result})
        return result

    def _kept(self, path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
        """The figure in `path`; None where it was not measured yet, or is not a whole file."""
        try:
            kept = read_json(path, "the kept figure")
            return kept["result"] if kept["key"] == key else None
        except (UserError, KeyError):
            return None


def content_fingerprint(folder: Path) -> str:
    """sha256 over all that an evaluation depends on: weights, configuration, tokenizer, templates, processor.

    Every byte counts: an evaluation reads them all anyway. The model card and what the stages recorded (casp_*)
    do not change a figure and are left out.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != "README.md" and not path.name.startswith((".", "casp_")):
            digest.update(f"{path.name}\n".encode())
            digest.update(bytes.fromhex(file_digest(path)))
    return digest.hexdigest()


class Evaluation:
    """The figures of one checkpoint; the model is loaded when the first figure that is not kept asks for it."""

    def __init__(self, subject: Subject, figures: Figures, scoring: Scoring) -> None:
        self.subject, self.figures, self.scoring = subject, figures, scoring
        self.config = open_config(subject.folder)
        refuse_foreign(subject.folder, self.config)
        self.opened: Checkpoint | None = None
        compute = compute_named(scoring.device, scoring.dtype).of(self.config.dtype or torch.float32)
        self.key = {
            "protocol": PROTOCOL,
            "checkpoint": content_fingerprint(subject.folder),
            "device": compute.device.type,
            "dtype": str(compute.dtype),
        }

    def checkpoint(self) -> Checkpoint:
        if self.opened is None:
            self.opened = open_checkpoint(str(self.subject.folder), self.scoring.device, self.scoring.dtype)
        return self.opened

    def text(self, text: str) -> dict[str, Any]:
        how = self.scoring
        key = {
            **self.key,
            "figure": "text",
            "data": hashlib.sha256(text.encode()).hexdigest(),
            "windows": how.windows,
            "sequence_length": how.sequence_length,
        }
        return self.figures.get(
            key,
            lambda: text_perplexity(
                self.checkpoint(),
                text,
                how.sequence_length,
                how.windows,
                how.batch_size,
                self._bar("text"),
                self.figures.ranks,
            ),
        )

    def answer_perplexity(self, items: list[Chat], fingerprint: str) -> dict[str, Any]:
        key = {**self.key, "figure": "answers", "data": fingerprint}
        return self.figures.get(
            key,
            lambda: questions.answer_perplexity(
                self.checkpoint(), items, self.scoring.batch_size, self._bar("answers scored"), self.figures.ranks
            ),
        )

    def accuracy(self, items: list[Chat], fingerprint: str) -> dict[str, Any]:
        length = self.scoring.max_new_tokens
        key = {**self.key, "figure": "accuracy", "data": fingerprint, "max_new_tokens": length}

        def measure() -> dict[str, Any]:
            bar = self._bar("questions asked")
            size, ranks = self.scoring.batch_size, self.figures.ranks
            given = questions.answers(self.checkpoint(), items, size, length, bar, ranks)
            return questions.accuracy(items, given)

        return self.figures.get(key, measure)

    def _bar(self, what: str) -> str:
        return f"{self.subject.label or self.subject.given}: {what}"

    def row(self, texts: dict[str, str], items: list[Chat], fingerprint: str) -> report.Row:
        """The row of report.json, with the interval, the kinds and where the checkpoint lies besides.

        texts: by name; the first is the one that plots and tables call the text.
        """
        folder, subject = self.subject.folder, self.subject
        stages = read_report(folder)
        stored = size(folder)
        asked = is_multimodal(self.config)
        text_figures = {name: self.text(text) for name, text in texts.items()}
        text_figure, *_ = text_figures.values()
        answer_figure = self.answer_perplexity(items, fingerprint) if asked else None
        right = self.accuracy(items, fingerprint) if asked else None
        self.opened = None
        gc.collect()
        return {
            "model": base_model(subject, stages),
            "method": subject.label or report.method_name(self.config, stages),
            "bpw": stored.bpw,
            "bytes": stored.bytes,
            "perplexity_text": text_figure["perplexity"],
            "perplexity_texts": {name: figure["perplexity"] for name, figure in text_figures.items()},
            "perplexity_image_text": answer_figure["perplexity"] if answer_figure else None,
            "accuracy": right["accuracy"] if right else None,
            "questions": right["questions"] if right else None,
            "accuracy_interval": right["interval"] if right else None,
            "kinds": right["kinds"] if right else {},
            "text_tokens": text_figure["tokens"],
            "dtype": self.key["dtype"].removeprefix("torch."),
            "device": self.key["device"],
            "checkpoint": subject.given,
            "sha256": self.key["checkpoint"],
        }


def refuse_foreign(folder: Path, config: Any) -> None:
    """UserError for a checkpoint that something else than CASP quantized: what it stores cannot be counted alike."""
    method = quantization_of(config).get("quant_method", "casp")
    if method != "casp":
        raise UserError(
            f"{folder} is stored in the format of {method}, whose bits per weight compare.sh does not count; give the "
            "CASP checkpoint that it was exported from, which holds the same weights, or score it alone with "
            "perplexity.sh or questions.sh."
        )


def base_model(subject: Subject, stages: dict[str, Any] | None) -> str:
    """The name of the model that a checkpoint was made from, as the stages recorded it, else its own."""
    return model_name(stages["base_model"] if stages else subject.given)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="compare.sh",
        description="Evaluate checkpoints alike; write report.md, report.json and plots. Run again to resume.",
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help=f"a folder, a hub id or a built-in name ({', '.join(NAMES)}); NAME=CHECKPOINT sets its name in the report",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the report and the kept figures")
    parser.add_argument(
        "--split",
        default="test",
        choices=sources.EVALUATION_SCENES,
        help="built-in questions, and the built-in texts of that split: for all but the validation splits, test "
        f"and {UNCALIBRATED}, a register that calibration has nothing of (default: %(default)s)",
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="TEXT",
        help="a text to score, several times for several, instead of the split's: "
        f"{', '.join(sources.EVALUATION_TEXTS)} or a .txt or .jsonl file; the first is the one that plots show",
    )
    parser.add_argument(
        "--questions-file", help="a .jsonl of image, question, answer, kind, instead of the built-in questions"
    )
    add_question_arguments(parser, "--questions-file")
    add_text_arguments(parser)
    add_batch_argument(parser)
    add_device_arguments(parser)
    parser.add_argument(
        "--update-cards",
        action="store_true",
        help="also put the table into the model cards of the checkpoints that CASP made",
    )
    return parser


def check_place(output: Path, inputs: Iterable[Path]) -> None:
    """UserError where the report would be written into `inputs`, into a model, or over what is no report."""
    check_report(output, REPORT_FILES, inputs, "report.json", {"model", "method", "bpw"})


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_intermixed_args(arguments)
    subjects = [Subject.parse(text) for text in options.checkpoints]
    named = [*(options.text or []), options.questions_file]
    files = [Path(name) for name in named if name and Path(name).is_file()]
    inputs = [*(subject.folder for subject in subjects), *files]
    check_place(options.output, inputs)
    names = options.text or (["validation"] if options.split.endswith("validation") else ["test", UNCALIBRATED])
    texts = {name: sources.evaluation_text(name) for name in names}
    questions_name = options.questions_file or options.split
    scoring = Scoring(
        options.device,
        options.dtype,
        options.windows,
        options.sequence_length,
        options.batch_size,
        options.max_new_tokens,
    )
    figures = Figures(options.output / "figures", here())
    evaluations = [Evaluation(subject, figures, scoring) for subject in subjects]
    items: list[Chat] = []
    if any(is_multimodal(evaluation.config) for evaluation in evaluations):
        items = sources.evaluation_chats(questions_name, options.questions, options.seed)
    fingerprint = chats_fingerprint(items)
    make_output(options.output)
    rows = [evaluation.row(texts, items, fingerprint) for evaluation in evaluations]
    if not here().first:
        return
    settings = {
        "texts": ", ".join(texts),
        "windows": f"{options.windows or 'all'} of {options.sequence_length} tokens",
        "questions": f"{questions_name}, {len(items)} asked, at most {options.max_new_tokens} tokens an answer",
        "dtype": ", ".join(sorted({row["dtype"] for row in rows})),
        "device": ", ".join(sorted({row["device"] for row in rows})),
        "seed": options.seed,
    }
    details = [plots.block_details(subject.folder) for subject in subjects]
    pictures = plots.draw(rows, details, options.output)
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = shlex.join(["bash", "eval/scripts/compare.sh", *given])
    write_json(options.output / "report.json", rows)
    write_atomically(options.output / "report.md", report.markdown(rows, settings, command, pictures).encode())
    if options.update_cards:
        for subject, row in zip(subjects, rows, strict=True):
            if read_report(subject.folder) is not None:
                report.update_card(subject.folder, rows, row)
    print(report.table(rows))
    if kinds := report.kinds_table(rows):
        print(f"\n{kinds}")
    print(f"\nreport: {options.output / 'report.md'}")


if __name__ == "__main__":
    run_main(main, shared=True)
