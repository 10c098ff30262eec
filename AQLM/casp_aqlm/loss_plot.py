"""The figure of a comparison with the published algorithm: loss against time, a panel a matrix."""

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from casp.run.files import write_atomically

_LEAST = 0.05  # seconds: where the axis may begin
_OF = {"ours": ("this room", "#0072B2", "o"), "published": ("published algorithm", "#D55E00", "s")}


def draw(record: dict[str, Any], file: Path) -> None:
    """Write the PNG `file` of a record of `casp_aqlm.compare_published`."""
    matrices = record["matrices"]
    figure, panels = pyplot.subplots(1, len(matrices), figsize=(3.2 * len(matrices), 3), squeeze=False)
    for panel, found in zip(panels[0], matrices, strict=True):
        for key, (label, colour, marker) in _OF.items():
            seconds, losses = zip(*found[key], strict=True)
            panel.plot(
                [max(s, _LEAST) for s in seconds], losses, color=colour, marker=marker, markersize=3, label=label
            )
        panel.set(
            xscale="log", xlabel="CPU seconds", title=f"{found['matrix']} {tuple(found['shape'])}", ylim=(0, None)
        )
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda second, _: f"{second:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(color="#dddddd")
    panels[0][0].set_ylabel("relative weighted loss")
    panels[0][0].legend(frameon=False, loc="upper left", fontsize="small")
    figure.suptitle(f"AQLM {record['scheme']}, one thread")
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    pyplot.close(figure)
    write_atomically(file, image.getvalue())
