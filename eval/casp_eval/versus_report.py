"""Table and plots of `casp_eval.casp_vs_baseline`: means over seeds with their intervals, CASP beside its baseline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from scipy import stats

from casp.run.files import write_atomically, write_json
from casp_eval.plots import COLOURS, MARKERS, STYLE

Row = dict[str, Any]
MEASURES = {
    "excess_text": "excess nats, text",
    "excess_other_text": "excess nats, other text",
    "answer_perplexity": "answer perplexity",
    "accuracy": "exact match",
    "accuracy_unseen": "exact match, unseen vendor",
}
LEAST_SPAN = 0.5  # bits a weight that an axis shows at least: budgets of one kind differ by thousandths
_GROUP = ("model", "backend", "codebook", "tuned", "bits", "allocation")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval (Student's t); 0 for a single value, of which nothing is known."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, 0.0
    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, spread * float(stats.t.ppf(0.975, len(values) - 1))


def grouped(rows: Sequence[Row]) -> dict[tuple, list[Row]]:
    """The seeds of each setting together, in order."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in _GROUP), []).append(row)
    return dict(sorted(found.items(), key=lambda item: tuple(map(str, item[0]))))


def cell(rows: Sequence[Row], measure: str) -> str:
    """`0.512 ± 0.013`, or nothing where it was not measured."""
    values = [row[measure] for row in rows if row[measure] is not None]
    if not values:
        return ""
    mean, half = interval(values)
    shown = "{:.1%}" if measure.startswith("accuracy") else "{:.3f}"
    return shown.format(mean) + (f" ± {shown.format(half)}" if len(values) > 1 else "")


def table(rows: Sequence[Row]) -> str:
    """One line a setting, in Markdown."""
    heads = ["model", "backend", "budget", "allocation", "seeds", "bpw", *MEASURES.values()]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (model, backend, codebook, tuned, bits, allocation), members in grouped(rows).items():
        name = " ".join(filter(None, [backend, codebook, "fine-tuned" if tuned else None]))
        bpw = np.mean([row["bpw"] for row in members])
        cells = [model, name, f"{bits:g}", allocation, str(len(members)), f"{bpw:.3f}"]
        lines.append("| " + " | ".join([*cells, *(cell(members, measure) for measure in MEASURES)]) + " |")
    return "\n".join(lines)


def saved(rows: Sequence[Row]) -> list[float]:
    """Share of the baseline's excess on text that CASP's optimal plan takes away, one figure a pair of rows."""

    def key(row: Row) -> tuple:
        return tuple(row[name] for name in ("model", "backend", "codebook", "tuned", "bits", "seed"))

    base = {key(row): row["excess_text"] for row in rows if row["allocation"] == "uniform"}
    ours = {key(row): row["excess_text"] for row in rows if row["allocation"] == "optimal"}
    return [1 - ours[each] / base[each] for each in ours if each in base and base[each] > 0]


def taken_away(rows: Sequence[Row]) -> str | None:
    """`saved` in words: how many pairs, their mean with its interval, and the least; None without a pair."""
    shares = saved(rows)
    if not shares:
        return None
    mean, half = interval(shares)
    spread = f" ± {half:.1%} (95%)" if half else ", one pair without an interval" if len(shares) == 1 else ""
    return f"pairs: {len(shares)}, mean {mean:.1%}{spread}, least {min(shares):.1%}"


def draw(rows: Sequence[Row], model: str, file: Path) -> None:
    """Excess on text against bits a weight, CASP and baseline of each backend, with intervals."""
    lines: dict[tuple, dict[float, list[Row]]] = {}
    for row in rows:
        if row["model"] == model and row["allocation"] in ("uniform", "optimal"):
            kind = (row["backend"], row["codebook"], row["tuned"], row["allocation"])
            lines.setdefault(kind, {}).setdefault(row["bits"], []).append(row)
    kinds = sorted({kind[:3] for kind in lines}, key=str)
    with pyplot.rc_context(STYLE):
        figure, axis = pyplot.subplots(figsize=(7, 4.6))
        for kind, budgets in lines.items():
            index = kinds.index(kind[:3]) % len(COLOURS)
            ours = kind[3] == "optimal"
            parts = [("CASP-" if ours else "") + kind[0], kind[1], "fine-tuned" if kind[2] else None]
            points = sorted(budgets.items())
            found = [interval([row["excess_text"] for row in members]) for _, members in points]
            axis.errorbar(
                [np.mean([row["bpw"] for row in members]) for _, members in points],
                [middle for middle, _ in found],
                yerr=[half for _, half in found],
                color=COLOURS[index],
                marker=MARKERS[index],
                linestyle="-" if ours else ":",
                markerfacecolor=COLOURS[index] if ours else "white",
                capsize=3,
                label=" ".join(filter(None, parts)),
            )
        left, right = axis.get_xlim()
        axis.set_xlim(min(left, right - LEAST_SPAN), max(right, left + LEAST_SPAN))
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])  # a few points close together leave no margin of their own
        axis.set_xlabel("bits per original weight")
        axis.set_ylabel("text, nats a token above the original")
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.savefig(file, bbox_inches="tight")
        pyplot.close(figure)


def write_report(folder: Path, rows: Sequence[Row]) -> None:
    """report.json, report.md and a plot for each model, over the rows known so far."""
    write_json(folder / "report.json", list(rows))
    words = ["# CASP against its baselines at equal bytes", "", table(rows), ""]
    models = list(dict.fromkeys(row["model"] for row in rows))
    for model in models:
        of_model = [row for row in rows if row["model"] == model]
        whole = taken_away(of_model)
        if whole is None:
            continue
        words += [f"Excess log-perplexity of {model} on text that CASP takes away, {whole}; over seeds alone:", ""]
        kinds = dict.fromkeys((row["backend"], row["codebook"], row["tuned"], row["bits"]) for row in of_model)
        for kind in kinds:
            found = taken_away(
                [row for row in of_model if (row["backend"], row["codebook"], row["tuned"], row["bits"]) == kind]
            )
            backend, codebook, tuned, bits = kind
            name = " ".join(filter(None, [backend, codebook, "fine-tuned" if tuned else None]))
            words += [f"- {name}, {bits:g} bits: {found}"] if found is not None else []
        words.append("")
    for model in models:
        draw(rows, model, folder / f"{model}.png")
        words += [f"![{model}]({model}.png)", ""]
    write_atomically(folder / "report.md", "\n".join(words).encode())
