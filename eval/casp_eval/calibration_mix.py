"""What a model keeps, by what it was calibrated on: `python -m casp_eval.calibration_mix ... DATASET@SAMPLES ...`.

Each calibration set makes its own 2-bit QuIP# checkpoint, not fine-tuned, and all are scored alike with the original
model: texts of every register, and questions where the model takes images. Shares and numbers of samples are chosen
on the validation split; the test split only shows what was chosen.
"""

import argparse
import hashlib
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from casp.cli import Parser, add_device_arguments, model_folder, pick_device, run_main
from casp.data import sources
from casp.demo import NAMES, text
from casp.errors import UserError
from casp.model.decoder import Decoder
from casp.model.modality import is_multimodal
from casp.numbers import whole
from casp.reading.config import open_config
from casp.run.files import write_atomically, write_json
from casp.run.folder import check_places
from casp.run.outputs import check_file, make_output, refuse_inputs, require_writable
from casp_eval import compare, report

SPLITS = {"validation": tuple(text.VALIDATION.values()), "test": text.TEST}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(prog="calibration_mix.sh", description=__doc__.splitlines()[0])
    flags.add_argument("--model", required=True, help=f"hub id, folder, or built-in name ({', '.join(NAMES)})")
    flags.add_argument(
        "candidates", nargs="+", metavar="DATASET@SAMPLES", help="a calibration set and how many samples of it"
    )
    flags.add_argument("--split", default="validation", choices=SPLITS, help="what is scored (default: %(default)s)")
    flags.add_argument("--work", type=Path, required=True, help="folder for the checkpoints and the kept figures")
    flags.add_argument("--output", type=Path, required=True, help="JSON file to write; a table goes beside it as .md")
    flags.add_argument("--windows", type=whole(1), default=16, help="windows of each text (default: %(default)s)")
    flags.add_argument("--questions", type=whole(1), default=300, help="questions asked (default: %(default)s)")
    add_device_arguments(flags)
    return flags


def place(work: Path, dataset: str, samples: int) -> Path:
    """The folder, in `work`, of what is calibrated on so many samples of a set; no two sets share one."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "-", dataset)[:60]
    told = "" if readable == dataset else "-" + hashlib.sha256(dataset.encode()).hexdigest()[:8]
    return work / f"{readable}{told}-{samples}"


def stages(model: str, dataset: str, samples: int, machine: Sequence[str], folder: Path) -> dict[Path, list[str]]:
    """Output -> the stage that makes it, in their order; the last is the checkpoint.

    machine: --device and --dtype with their words.
    """
    data = ["--model", model, f"--dataset={dataset}", "--samples", str(samples), *machine]
    moments = folder / "moments"
    rounding = ["--from-original", "--moments", str(moments), "--bits", "2", "--ft-epochs", "0"]
    return {
        moments: ["casp.moments", *data, "--from-original"],
        folder / "quip-sharp-2bit": ["casp_quip_sharp", *data, *rounding],
    }


def check(args: argparse.Namespace, candidates: Sequence[tuple[str, int]], original: Path) -> None:
    """UserError, before the first set is calibrated on for long, for what a later step would not read or write."""
    multimodal = Decoder(original).is_multimodal
    pick_device(args.device)
    inputs, outputs = [original], [args.work / f"compared-{args.split}"]
    for dataset, samples in candidates:
        sources.check(dataset, multimodal)
        inputs += sources.files(dataset)
        outputs += stages(args.model, dataset, samples, (), place(args.work, dataset, samples))
    check_file(args.output, [{"command", "model", "split", "results"}], [*inputs, *outputs])
    page = args.output.with_suffix(".md")
    if page == args.output or (page.exists() and not args.output.exists()):
        raise UserError(f"{page}, where the table would go, is --output itself or was there before; choose another.")
    refuse_inputs(page, inputs)
    compare.check_place(outputs[0], inputs)
    for output in outputs[1:]:
        check_places(output, inputs, "--work")
    require_writable(args.output)
    make_output(args.work, "--work")


def calibrated(todo: dict[Path, list[str]]) -> Path:
    """The checkpoint that the stages of `todo` make, where it is not there yet."""
    for output, arguments in todo.items():
        print(f"== {output}", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, "-m", *arguments, "--output", str(output)], stdout=sys.stderr)
        if done.returncode:
            raise SystemExit(done.returncode)  # the stage has said why
    return list(todo)[-1]


def excess(row: report.Row, original: report.Row) -> dict[str, float]:
    """Nats a token above the original model, by text; "answers" for the answers to questions."""
    found = {
        name: math.log(perplexity / original["perplexity_texts"][name])
        for name, perplexity in row["perplexity_texts"].items()
    }
    if row["perplexity_image_text"]:
        found["answers"] = math.log(row["perplexity_image_text"] / original["perplexity_image_text"])
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Excess nats by text, one row a calibration set, and how many times the best text's excess the worst's is."""
    texts = list(results[0]["excess"])
    asked = results[0]["accuracy"] is not None
    heads = [
        "calibrated on",
        "samples",
        *texts,
        "mean of texts",
        "worst / best",
        *(["questions right"] if asked else []),
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for result in results:
        losses = [nats for name, nats in result["excess"].items() if name != "answers"]
        cells = [f"`{result['dataset']}`", str(result["samples"]), *(f"{result['excess'][name]:.3f}" for name in texts)]
        cells += [f"{sum(losses) / len(losses):.3f}", f"{max(losses) / min(losses):.2f}" if min(losses) > 0 else "–"]
        cells += [report.share(result["accuracy"], result["accuracy_interval"])] if asked else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_intermixed_args(arguments)
    candidates = []
    for candidate in args.candidates:
        dataset, _, samples = candidate.rpartition("@")
        if not dataset or not re.fullmatch("[1-9][0-9]{0,6}", samples):
            raise UserError(f"{candidate[:80]} is not DATASET@SAMPLES: write for example demo-mixed@32")
        candidates.append((dataset, int(samples)))
    original = model_folder(args.model)
    check(args, candidates, original)
    machine = ("--device", args.device, "--dtype", args.dtype)
    folders = [calibrated(stages(args.model, *one, machine, place(args.work, *one))) for one in candidates]
    scored = args.work / f"compared-{args.split}"
    texts = [word for name in SPLITS[args.split] for word in ("--text", name)]
    sizes = ["--windows", str(args.windows), "--questions", str(args.questions), *machine]
    compare.main([*map(str, [original, *folders]), "--output", str(scored), "--split", args.split, *texts, *sizes])
    first, *rows = json.loads((scored / "report.json").read_text(encoding="utf-8"))
    results = [
        {
            "dataset": dataset,
            "samples": samples,
            "excess": excess(row, first),
            "accuracy": row["accuracy"],
            "accuracy_interval": row["accuracy_interval"],
            "bpw": row["bpw"],
        }
        for (dataset, samples), row in zip(candidates, rows, strict=True)
    ]
    command = shlex.join(
        ["bash", "eval/scripts/calibration_mix.sh", *(sys.argv[1:] if arguments is None else arguments)]
    )
    multimodal = is_multimodal(open_config(original))
    write_json(
        args.output,
        {
            "command": command,
            "model": args.model,
            "split": args.split,
            "original": {
                "perplexity_texts": first["perplexity_texts"],
                "perplexity_answers": first["perplexity_image_text"],
                "accuracy": first["accuracy"],
            },
            "results": results,
        },
    )
    right = f"; the original answers {100 * first['accuracy']:.1f}% right" if multimodal else ""
    text_ = (
        f"# `{args.model}`, {args.split}\n\nNats a token above the original model, 2-bit QuIP#, not fine-tuned, "
        f"{args.windows} windows of 512 tokens a text{right}.\n\n{table(results)}\n\n```bash\n{command}\n```\n"
    )
    write_atomically(args.output.with_suffix(".md"), text_.encode())
    print(table(results))


if __name__ == "__main__":
    run_main(main)
