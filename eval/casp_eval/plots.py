"""Figures of a comparison: quality against size, bits, ranks and attention density per block, fine-tuning curves.

Colours are Okabe and Ito's, told apart by colour-blind readers; every series has a marker of its own as well.
"""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from casp.model.checkpoint import stored_bytes
from casp.model.decoder import Decoder
from casp.run.files import write_atomically
from casp.run.report import read_report
from casp_eval.report import Row

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
STYLE = {
    "font.size": 11,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 150,
    "legend.frameon": False,
}


FIGURES = ("quality_vs_bpw", "bits_and_ranks", "attention_density", "fine_tuning")
"""Names of the files that `draw` makes."""


@dataclass
class BlockDetails:
    """What is known of each block of a checkpoint; NaN where it is not.

    bits: stored bits per original weight; ranks: role -> rank of the low-rank linears; density: "image" and
    "text" -> share of the keys that get attention; influence: 1 - cosine of what enters and leaves the block;
    tuned: share of the error of the block's output that its fine-tunings removed; end_to_end: losses by epoch.
    """

    bits: list[float]
    ranks: dict[str, list[float]] = field(default_factory=dict)
    density: dict[str, list[float]] = field(default_factory=dict)
    influence: list[float] = field(default_factory=list)
    tuned: list[float] = field(default_factory=list)
    end_to_end: list[dict[str, float | None]] = field(default_factory=list)


def block_details(folder: Path) -> BlockDetails:
    """Bits and ranks from the checkpoint's own tensors; density and influence from its casp_report.json."""
    decoder = Decoder(folder)
    modules = (decoder.compression or {}).get("modules", {})
    bits, ranks = [], {}
    for index, block in enumerate(decoder.blocks):
        weights = 0
        for role, path in decoder.linears(index).items():
            linear = decoder.block(index).get_submodule(path)
            weights += linear.in_features * linear.out_features
            rank = modules.get(f"{block}.{path}", {}).get("rank")
            if rank is not None:
                ranks.setdefault(role, [np.nan] * len(decoder.blocks))[index] = rank
        bits.append(8 * stored_bytes(decoder, index) / weights)
    details = BlockDetails(bits, ranks)
    report = read_report(folder) or {}
    details.end_to_end = report.get("end_to_end", [])
    blocks = report.get("blocks", [])
    if len(blocks) == len(bits):
        if all("tuning" in block for block in blocks):
            details.tuned = [_error_removed(block["tuning"]) for block in blocks]
        details.influence = [_number(block.get("block_influence")) for block in blocks]
        for kind in ("image", "text"):
            found = [_number((block.get("attention_density") or {}).get(kind)) for block in blocks]
            if not np.isnan(found).all():
                details.density[kind] = found
    return details


def _error_removed(tunings: list[dict[str, Any]]) -> float:
    """1 - the product, over the fine-tunings of a block, of the validation error after it over that before it."""
    kept = 1.0
    for tuning in tunings:
        losses = [entry["validation"] for entry in tuning["curve"]]
        kept *= min(losses) / losses[0] if losses[0] else 1.0
    return 1 - kept


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def draw(rows: list[Row], details: list[BlockDetails], folder: Path) -> list[Path]:
    """Draw every figure that the data allow into `folder`; the paths of the PNG files, in reading order."""
    drawn = (quality(rows), bits_and_ranks(rows, details), attention_density(rows, details), fine_tuning(rows, details))
    paths = []
    for name, figure in zip(FIGURES, drawn, strict=True):
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # left by an earlier comparison of other checkpoints
            continue
        picture = io.BytesIO()
        figure.savefig(picture, format="png", bbox_inches="tight")
        write_atomically(path, picture.getvalue())
        pyplot.close(figure)
        paths.append(path)
    return paths


def names(rows: list[Row]) -> list[str]:
    """What each row is called in a legend: its method, with the model when there are several."""
    several = len({row["model"] for row in rows}) > 1
    return [f"{row['model']}, {row['method']}" if several else row["method"] for row in rows]


def quality(rows: list[Row]) -> Figure:
    """Each quality that some row has against bits per weight: perplexities on a log scale, accuracy with intervals."""
    wanted = {
        "perplexity_text": "Text perplexity (log scale, lower is better)",
        "perplexity_image_text": "Answer perplexity (log scale, lower is better)",
        "accuracy": "Exact match (higher is better)",
    }
    keys = [key for key in wanted if any(row[key] is not None for row in rows)]
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(keys), figsize=(4.6 * len(keys), 4.4), squeeze=False)
        for axis, key in zip(axes[0], keys, strict=True):
            for index, (row, name) in enumerate(zip(rows, names(rows), strict=True)):
                if row[key] is None:
                    continue
                style = {**_style(index), "markersize": 9, "linestyle": "none", "label": name}
                if key == "accuracy":
                    low, high = row["accuracy_interval"]
                    reach = [[max(0.0, row[key] - low)], [max(0.0, high - row[key])]]
                    axis.errorbar(row["bpw"], row[key], yerr=reach, capsize=4, **style)
                else:
                    axis.plot(row["bpw"], row[key], **style)
            axis.set_title(wanted[key], fontsize=11)
            axis.set_xlabel("bits per original weight (log scale)")
            _log_bits(axis.xaxis, axis, [row["bpw"] for row in rows])
            if key == "accuracy":
                axis.set_ylim(-0.02, 1.02)
                axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
            else:
                _log_quality(axis, [row[key] for row in rows if row[key] is not None])
        _legend_below(figure, axes[0])
        return figure


def bits_and_ranks(rows: list[Row], details: list[BlockDetails]) -> Figure | None:
    """Stored bits per weight of each block, the ranks of its low-rank linears, and the block influences."""
    with_ranks = any(one.ranks for one in details)
    influence = next((one.influence for one in details if one.influence and not np.isnan(one.influence).all()), None)
    if not with_ranks and len({round(bits, 6) for one in details for bits in one.bits}) < 2:
        return None  # no rank, and the same bits everywhere: nothing to see
    count = 1 + with_ranks + (influence is not None)
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(count, 1, figsize=(9, 1 + 2.5 * count), squeeze=False, sharex=True)
        panels = list(axes[:, 0])
        axis = panels.pop(0)
        for index, (name, one) in enumerate(zip(names(rows), details, strict=True)):
            _step(axis, one.bits, index, name)
        axis.set_title("Bits stored per original weight, per block", fontsize=11)
        axis.set_ylabel("bits (log scale)")
        _log_bits(axis.yaxis, axis, [bits for one in details for bits in one.bits])
        if with_ranks:
            axis = panels.pop(0)
            for index, (shared, ranks) in enumerate(_distinct_ranks(names(rows), details)):
                line = ("-", "--", ":", "-.")[index % 4]
                _step(axis, ranks, shared[0], "\n".join(shared[1]), linestyle=line)
            axis.set_title("Rank of the low-rank linears, per block", fontsize=11)
            axis.set_ylabel("rank")
            axis.set_ylim(0, 1.1 * max(np.nanmax(one) for each in details for one in each.ranks.values()))
        if influence is not None:
            axis = panels.pop(0)
            axis.bar(range(len(influence)), influence, color="#999999", width=0.7)
            axis.set_title("Block influence: 1 − cosine between what enters and leaves a block", fontsize=11)
            axis.set_ylabel("influence")
        panels = axes[:, 0]
        panels[-1].set_xlabel("block")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in panels[: 1 + with_ranks]:
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=10)
        figure.tight_layout()
        return figure


def _distinct_ranks(names: list[str], details: list[BlockDetails]) -> list[tuple[tuple[int, list[str]], list[float]]]:
    """Each different course of ranks once: ((row that sets its colour, "method: role" of all that share it), ranks).

    A quantized low-rank checkpoint has the ranks of the one it was made from; two lines would hide each other.
    """
    found: dict[bytes, tuple[tuple[int, list[str]], list[float]]] = {}
    for index, (name, one) in enumerate(zip(names, details, strict=True)):
        for role, ranks in one.ranks.items():
            entry = found.setdefault(np.asarray(ranks).tobytes(), ((index, []), ranks))
            entry[0][1].append(f"{name}: {role}")
    return list(found.values())


def attention_density(rows: list[Row], details: list[BlockDetails]) -> Figure | None:
    """Attention density per block for image and text keys, one panel a model that has it."""
    found: dict[str, dict[str, list[float]]] = {}
    for row, one in zip(rows, details, strict=True):
        if one.density:
            found.setdefault(row["model"], one.density)
    if not found:
        return None
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(len(found), 1, figsize=(8, 1 + 3 * len(found)), squeeze=False)
        for axis, (model, density) in zip(axes[:, 0], found.items(), strict=True):
            for index, (kind, values) in enumerate(density.items(), 1):
                axis.plot(values, **_style(index), markersize=6, linewidth=1.8, label=f"{kind} keys")
            axis.set_title(f"Attention density per block: {model}", fontsize=11)
            axis.set_ylabel("share of the visible keys that\nhold 95% of the attention")
            axis.set_xlabel("block")
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend()
        figure.tight_layout()
        return figure


def fine_tuning(rows: list[Row], details: list[BlockDetails]) -> Figure | None:
    """What fine-tuning did: the error of each block's output, and the divergence from the original by epoch."""
    with_blocks = any(one.tuned for one in details)
    with_epochs = any(one.end_to_end for one in details)
    if not with_blocks and not with_epochs:
        return None
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, with_blocks + with_epochs, figsize=(6.2 * (with_blocks + with_epochs), 4.4))
        panels = list(np.atleast_1d(axes))
        if with_blocks:
            axis = panels.pop(0)
            for index, (name, one) in enumerate(zip(names(rows), details, strict=True)):
                line = ("-", "--", ":", "-.")[index % 4]  # what differs end to end alone has the same course here
                axis.plot(one.tuned, **_style(index), markersize=4.5, linestyle=line, label=name if one.tuned else None)
            axis.set_title("In the block: share of its output error removed (validation)", fontsize=11)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
            axis.set_xlabel("block")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_ylim(bottom=0)
            axis.legend(fontsize=9)
        if with_epochs:
            axis = panels.pop(0)
            for index, (name, one) in enumerate(zip(names(rows), details, strict=True)):
                for kind, line in (("training", ":"), ("validation", "-")):
                    if one.end_to_end:
                        values = [_number(entry[kind]) for entry in one.end_to_end]
                        style = {**_style(index), "markersize": 6, "linestyle": line}
                        axis.plot(values, **style, label=f"{name}, {kind}")
            axis.set_title("End to end: KL from the original, nats a token", fontsize=11)
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_ylim(bottom=0)
            axis.legend(fontsize=9)
        figure.tight_layout()
        return figure


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _step(axis: Axes, values: list[float], index: int, label: str, linestyle: str = "-") -> None:
    style = {**_style(index), "markersize": 4.5, "linewidth": 1.6, "linestyle": linestyle}
    axis.plot(values, drawstyle="steps-mid", label=label, **style)


_LARGEST = 1e12  # of a perplexity on an axis: that of a damaged model has three hundred digits


def _log_bits(side: Any, axis: Axes, values: list[float]) -> None:
    """A log2 scale for bits with a tick at every whole format inside the range."""
    low, high = min(values) / 1.25, max(values) * 1.25
    if side is axis.xaxis:
        axis.set_xscale("log", base=2)
        axis.set_xlim(low, high)
    else:
        axis.set_yscale("log", base=2)
        axis.set_ylim(low, high)
    side.set_major_locator(FixedLocator([tick for tick in (0.5, 1, 2, 3, 4, 6, 8, 16, 32) if low <= tick <= high]))
    side.set_minor_locator(NullLocator())
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _log_quality(axis: Axes, values: list[float]) -> None:
    """A log scale with plain numbers: 1-2-5 steps within three decades, powers of ten beyond; it ends at 10^12."""
    low, high = (min(value, _LARGEST) for value in (min(values) / 1.3, max(values)))
    high = max(1.3 * high, 2 * low)
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    steps = (1, 2, 5) if high / low < 1000 else (1,)
    if high / low < 10:
        steps = (1, 1.5, 2, 3, 4, 5, 7)
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    axis.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))


def _legend_below(figure: Figure, axes: np.ndarray) -> None:
    """One legend for all panels, under them."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.tight_layout()
    inches = figure.get_figwidth()
    columns = int(inches / (0.6 + 0.09 * max(map(len, entries))))  # what a marker and a letter take
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=min(max(columns, 1), len(entries)),
    )
