"""Rows of a comparison: what a checkpoint is called, and the table as JSON, Markdown and in model cards."""

from pathlib import Path
from typing import Any

from casp.errors import UserError
from casp.reading.config import quantization_of
from casp.run.card import RESULTS_BEGIN, RESULTS_END
from casp.run.files import write_atomically

Row = dict[str, Any]

BACKENDS = {"gptq": "GPTQ", "quip-sharp": "QuIP#", "aqlm": "AQLM"}
DENSE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
NOTES = """\
*bpw*: bits stored for the decoder's linears, every overhead counted, per weight they had in the original model.
*Perplexity* of a text: exp of the mean loss over non-overlapping windows. *Answer perplexity*: the same over the tokens
of the right answers, given image and question. *Exact match*: share of questions answered right by greedy decoding,
after trimming, lower-casing and dropping a final dot; in brackets the 95% Wilson interval. A dash: not applicable."""


def method_name(config: Any, report: dict[str, Any] | None) -> str:
    """What was done to a checkpoint, in a few words: "bf16", "SVD 25%", "GPTQ 2-bit g64", "CASP-GPTQ 2-3-bit",
    "QuIP# 2-bit + block and e2e FT".

    From the quantization_config that CASP wrote into the model's configuration; `report` gives the keep ratio when
    it has one.
    """
    compression = quantization_of(config)
    if not compression:
        name = str(config.dtype or "float32").removeprefix("torch.")
        return DENSE.get(name, name)
    modules = compression["modules"].values()
    formats = [entry["format"] for entry in modules if "format" in entry]
    low_rank = any("rank" in entry for entry in modules)
    if not formats:
        ratios = [stage["settings"].get("keep_ratio") for stage in (report or {}).get("stages", [])]
        ratio = next((ratio for ratio in ratios if ratio is not None), None)
        return "SVD" if ratio is None else f"SVD {100 * ratio:g}%"
    backend = BACKENDS.get(compression["backend"], compression["backend"])
    tuning = next(
        (
            stage["settings"]["fine_tuning"]
            for stage in (report or {}).get("stages", [])[-1:]
            if "fine_tuning" in stage["settings"]
        ),
        {},
    )
    tuned = [word for part, word in (("block", "block"), ("end_to_end", "e2e")) if tuning.get(part)]
    suffix = f" + {' and '.join(tuned)} FT" if tuned else ""
    return f"{'CASP-' if low_rank else ''}{backend}{_format_words(formats)}{suffix}"


def _format_words(formats: list[dict[str, Any]]) -> str:
    """ " 2-bit g64" for one format, " 2-4-bit g64" for a range of bits; nothing for what a format does not say."""
    bits = sorted({entry["bits"] for entry in formats if "bits" in entry})
    groups = {entry["group_size"] for entry in formats if "group_size" in entry}
    words = f" {bits[0]:g}-bit" if len(bits) == 1 else f" {bits[0]:g}-{bits[-1]:g}-bit" if bits else ""
    group = next(iter(groups)) if len(groups) == 1 else None
    return words + (f" g{group}" if isinstance(group, int) and group > 0 else "")


def table(rows: list[Row], this: Row | None = None) -> str:
    """The comparison as a Markdown table; `this` row in bold."""
    texts = list(rows[0]["perplexity_texts"]) if rows else []
    heads = ["model", "method", "bpw", "size, MB", *(f"perplexity of {Path(name).stem}" for name in texts)]
    heads += ["answer perplexity", "exact match", "questions"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in rows:
        cells = [
            row["model"],
            row["method"],
            number(row["bpw"], 2),
            number(row["bytes"] and row["bytes"] / 1e6, 1),
            *(number(row["perplexity_texts"][name], 2) for name in texts),
            number(row["perplexity_image_text"], 3),
            share(row["accuracy"], row["accuracy_interval"]),
            "–" if row["questions"] is None else str(row["questions"]),
        ]
        if row is this:
            cells = [f"**{cell}**" for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kinds_table(rows: list[Row]) -> str:
    """Exact match per kind of question, one column a row of the comparison; empty when nobody was asked."""
    asked = [row for row in rows if row["kinds"]]
    if not asked:
        return ""
    names = sorted({kind for row in asked for kind in row["kinds"]})
    models = {row["model"] for row in asked}
    heads = [row["method"] if len(models) == 1 else f"{row['model']} {row['method']}" for row in asked]
    lines = [f"| kind | questions | {' | '.join(heads)} |", "|---|---:|" + "---:|" * len(asked)]
    for name in names:
        found = [row["kinds"].get(name) for row in asked]
        cells = [share(one["accuracy"], one["interval"]) if one else "–" for one in found]
        count = next(one["questions"] for one in found if one)
        lines.append(f"| {name} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def number(value: float | None, digits: int) -> str:
    """A figure for a table: fixed digits, thousands separated, no digits after the point from 1000 on."""
    if value is None:
        return "–"
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}f}"


def share(value: float | None, interval: list[float] | None) -> str:
    """A proportion with its interval, in percent."""
    if value is None or interval is None:
        return "–"
    return f"{100 * value:.1f}% ({100 * interval[0]:.0f}–{100 * interval[1]:.0f})"


def markdown(rows: list[Row], settings: dict[str, Any], command: str, plots: list[Path]) -> str:
    """report.md: the table, the kinds, the plots, the settings and the command that made it."""
    parts = ["# Comparison", table(rows), NOTES]
    if kinds := kinds_table(rows):
        parts += ["## Exact match per kind of question (95% interval)", kinds]
    parts += [f"![{plot.stem.replace('_', ' ')}]({plot.name})" for plot in plots]
    lines = [f"- {name.replace('_', ' ')}: {value}" for name, value in settings.items()]
    parts += ["## Settings", "\n".join(lines), "## Command", f"```\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def update_card(folder: Path, rows: list[Row], this: Row) -> None:
    """Put the measured table between the markers of a checkpoint's model card.

    UserError when the folder has no card with markers: only checkpoints made by CASP's stages have one.
    """
    card = folder / "README.md"
    try:
        text = card.read_text(encoding="utf-8")
        before, rest = text.split(RESULTS_BEGIN, 1)
        _, after = rest.split(RESULTS_END, 1)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} has no model card with the markers {RESULTS_BEGIN} and {RESULTS_END}: "
            "update the cards of checkpoints made by CASP only"
        ) from error
    filled = f"{before}{RESULTS_BEGIN}\n{table(rows, this)}\n\n{NOTES}\n{RESULTS_END}{after}"
    write_atomically(card, filled.encode())
