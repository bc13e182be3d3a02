"""The picture of `benchmarks.drift`: error of the gradients against depth, a panel for each precision."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.labels import label_ends

# Okabe and Ito's colours, which the colour-blind can tell apart; shapes and labels say it again.
STYLES: dict[str, dict[str, Any]] = {
    "plain": {"color": "black", "marker": "o", "markersize": 9, "markerfacecolor": "none"},
    "revseg lossless": {"color": "#0072B2", "marker": "."},
    "revseg exact": {"color": "#56B4E9", "marker": "D"},
    "revseg": {"color": "#E69F00", "marker": "s"},
    "memcnn": {"color": "#CC79A7", "marker": "^"},
    "revtorch": {"color": "#009E73", "marker": "v"},
    "revlib": {"color": "#D55E00", "marker": "x"},
    "invtorch": {"color": "#999999", "marker": "+"},
}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes a PNG.

    Args:
        rows: What `benchmarks.drift.measure` returns; rows without an error are left out.
        path: The file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if "error" in row]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(5.9 * len(dtypes), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for dtype, axes in zip(dtypes, figure.subplots(1, len(dtypes), squeeze=False)[0], strict=True):
        _panel(axes, [row for row in rows if row["dtype"] == dtype])
        axes.set_title(dtype)
    figure.savefig(path, format="png", dpi=120)


def _panel(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import NullLocator

    depths = sorted({row["depth"] for row in rows})
    ends = {}
    for way, style in STYLES.items():
        points = sorted((row["depth"], row["error"]) for row in rows if row["way"] == way)
        if points:
            axes.plot(*zip(*points, strict=True), linewidth=1.6, **{"markersize": 5, **style})
            ends[way] = points[-1][1]
    axes.set(xscale="log", yscale="log", xlabel="depth, blocks", ylabel="error of the parameter gradients")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(depths[0] * 0.9, depths[-1] * 1.1)
    low, high = math.log(min(row["error"] for row in rows)), math.log(max(row["error"] for row in rows))
    margin = 0.14 * (high - low) + 0.1
    axes.set_ylim(math.exp(low - margin), math.exp(high + margin))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    label_ends(axes, ends, {way: style["color"] for way, style in STYLES.items()})
