"""The rows of the paper's tables, one command each: `python -m casp_eval.paper_tables --row images/LLaVA-1.5-7B/gptq`.

A row is a table, a model and a method (arXiv 2503.05936, section 5): the stages that make the checkpoint, then the
table's benchmarks in lmms-eval, or perplexities. `--dry-run` prints the commands of the rows and resolves what they
name without the hub: tasks (in the harness, or in the stored list of its names where it is not installed), the model's
shape, and the bytes of the checkpoint's linears.
"""

import importlib.util
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from casp.backend import load_backend
from casp.budget import matrices, plan_bytes, uniform_plan
from casp.cli import Parser, add_device_arguments, run_main
from casp.errors import UserError
from casp.model.decoder import Decoder
from casp.numbers import whole
from casp_eval.harness import check_harness, check_tasks
from casp_eval.real_models import REAL, empty_checkpoint

TASKS = {
    "images": ("coco2017_cap_val", "nocaps_val", "flickr30k_test", "scienceqa_img", "mme", "seedbench"),
    "videos": ("videomme", "video_dc499"),
}
"""Table -> its benchmarks, by lmms-eval's names."""
TEXTS = ("wikitext2", "c4")
"""What the perplexities of the table "text" are measured on."""
MODELS = {
    "images": ("LLaVA-1.5-7B", "LLaVA-1.5-13B", "LLaVA-NeXT-Mistral-7B", "LLaVA-NeXT-Vicuna-13B"),
    "videos": ("LLaVA-NeXT-Video-7B", "LLaVA-OneVision-7B", "Qwen2.5-VL-7B"),
    "text": ("Llama-2-7B",),
}
BACKENDS = {
    "gptq": ("casp_gptq", ("--bits", "2", "--group-size", "128"), {"bits": 2, "group_size": 128}, {}),
    "quip-sharp": ("casp_quip_sharp", ("--bits", "2", "--codebook", "e8p"), {"bits": 2}, {"codebook": "e8p"}),
    "aqlm": ("casp_aqlm", ("--scheme", "2x8g8"), {"scheme": "2x8g8"}, {}),
}
"""Backend -> its stage, the flags of 2 bits, and by what and under which settings its format is known."""
SVD = ("--keep-ratio", "0.25", "--whitening", "input")
"""The paper's first stage: a quarter of W_q and W_k, whitened by their inputs."""
STORED_NAMES = Path(__file__).parent / "tasks" / "lmms_eval_0.7.3.txt"


@dataclass(frozen=True)
class Row:
    """One row; method: "original", a backend, or "casp-" and a backend."""

    table: str
    model: str
    method: str

    @property
    def name(self) -> str:
        """What --row calls it."""
        return f"{self.table}/{self.model}/{self.method}"

    @property
    def backend(self) -> str | None:
        """The backend that quantizes, None for the original model."""
        return None if self.method == "original" else self.method.removeprefix("casp-")


ROWS = {
    row.name: row
    for table, models in MODELS.items()
    for model in models
    for method in ("original", *(prefix + backend for backend in BACKENDS for prefix in ("", "casp-")))
    for row in [Row(table, model, method)]
}


def commands(row: Row, folder: Path, machine: list[str], calibration: list[str], limit: int | None) -> list[list[str]]:
    """The words after `python -m` of everything a row takes, in order.

    folder: where its checkpoints and figures go; machine, calibration: flags for every command, and for the stages;
    limit: documents of a benchmark, or windows of a text, None for all. Stages pass over what is finished.
    """
    checkpoint, found = REAL[row.model].hub, []
    base = folder / row.model
    if row.method.startswith("casp-"):
        svd = base / "svd"
        found.append(["casp_svd", "--model", checkpoint, *SVD, *machine, *calibration, "--output", str(svd)])
        checkpoint = str(svd)
    if row.backend is not None:
        stage, flags, *_ = BACKENDS[row.backend]
        # Fine-tuning is off: the paper's tables are without.
        flags = [*flags, *(["--ft-epochs", "0"] if row.backend != "gptq" else [])]
        output = str(base / row.method)
        words = ["--model", checkpoint, "--from-original", *flags, *machine, *calibration, "--output", output]
        found.append([stage, *words])
        checkpoint = output
    figures = folder / "figures" / row.model / row.method
    if row.table == "text":
        windows = ["--windows", str(limit or 0), "--sequence-length", "4096"]
        for text in TEXTS:
            words = ["--model", checkpoint, "--dataset", text, *windows, *machine]
            found.append(["casp_eval.perplexity", *words, "--output", f"{figures}-{text}.json"])
        return found
    counted = [] if limit is None else ["--limit", str(limit)]
    words = ["--model", checkpoint, "--tasks", ",".join(TASKS[row.table]), *counted, *machine]
    return [*found, ["casp_eval.lmms_eval", *words, "--output", f"{figures}-{row.table}.json"]]


def planned_bytes(decoder: Decoder, backend_name: str) -> int:
    """Bytes of a decoder's linears in a backend's format of 2 bits; what low rank frees of them is spent again."""
    backend = load_backend(backend_name)
    _, _, known_by, settings = BACKENDS[backend_name]
    shapes = matrices(decoder)
    _, rows, columns = next(iter(shapes.values()))
    offered = backend.formats(rows, columns, **settings)
    format = next(one for one in offered if all(one.get(name) == value for name, value in known_by.items()))
    return plan_bytes(uniform_plan(decoder, format), shapes, backend)


def known_tasks() -> set[str]:
    """The names of lmms-eval's tasks: the installed harness's, else those stored beside this file."""
    if importlib.util.find_spec("lmms_eval") is None:
        return set(STORED_NAMES.read_text().splitlines()[1:])
    from lmms_eval.tasks import TaskManager

    return set(TaskManager().all_tasks)


def describe(rows: list[Row]) -> None:
    """Print what each model and plan of the rows comes to; UserError for a benchmark that the harness does not know."""
    check_tasks([task for row in rows for task in TASKS.get(row.table, ())], known_tasks(), None)
    for model in dict.fromkeys(row.model for row in rows):
        with tempfile.TemporaryDirectory() as folder:
            decoder = Decoder(empty_checkpoint(REAL[model].config(), Path(folder)))
            weights = decoder.original_weights()
            print(f"# {model} ({REAL[model].hub}): {weights:,} weights in {len(decoder.blocks)} blocks")
            for backend in dict.fromkeys(row.backend for row in rows if row.model == model and row.backend):
                size = planned_bytes(decoder, backend)
                print(f"#   {backend}: {size:,} bytes, {8 * size / weights:.4f} bits a weight, with or without CASP")


def main(arguments: list[str] | None = None) -> None:
    """Run rows, or say what they are."""
    parser = Parser(prog="paper_tables.sh", description="Rows of the paper's tables, each by one command.")
    parser.add_argument(
        "--row",
        action="append",
        metavar="TABLE/MODEL/METHOD",
        help="a row; may be given several times; --dry-run lists the names (default: every row)",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/paper"), help="folder (default: %(default)s)")
    parser.add_argument("--dataset", help="calibration data of the stages, as theirs (default: each stage's own)")
    parser.add_argument("--limit", type=whole(1), help="documents or windows a benchmark, a count (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="resolve and print everything, and end (default: off)")
    add_device_arguments(parser)
    options = parser.parse_args(arguments)
    for name in options.row or ():
        if name not in ROWS:
            raise UserError(
                f"--row {name} is unknown; --dry-run without --row lists all, an example is {next(iter(ROWS))}."
            )
    rows = [ROWS[name] for name in options.row or ROWS]
    machine = ["--device", options.device, "--dtype", options.dtype]
    calibration = [] if options.dataset is None else ["--dataset", options.dataset]
    if options.dry_run:
        describe(rows)
    elif any(row.table in TASKS for row in rows):
        check_harness(["any"], None, "lmms_eval", "lmms-eval")  # before stages run for hours
    for row in rows:
        print(f"== {row.name}", flush=True)
        for words in commands(row, options.output, machine, calibration, options.limit):
            print(f"python -m {shlex.join(words)}", flush=True)
            if not options.dry_run:
                status = subprocess.run([sys.executable, "-m", *words]).returncode
                if status:
                    raise SystemExit(status)  # the stage has said why


if __name__ == "__main__":
    run_main(main)
