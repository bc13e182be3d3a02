"""The picture of `benchmarks.memory_depth`: peak memory of a training step against depth, everybody's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.labels import label_ends

# Ours in blues and orange, PyTorch's in greys, the rivals' in greens and pinks; markers say it again.
STYLES: dict[str, dict[str, Any]] = {
    "plain": {"color": "black", "marker": "o"},
    "FrEIA": {"color": "#999933", "marker": "x"},
    "compile": {"color": "#777777", "marker": "*"},
    "checkpoint": {"color": "#555555", "marker": "P"},
    "checkpoint sqrt": {"color": "#999999", "marker": "X"},
    "memcnn": {"color": "#CC79A7", "marker": "^"},
    "invtorch": {"color": "#AA4499", "marker": "<"},
    "revlib": {"color": "#117733", "marker": ">"},
    "revtorch": {"color": "#009E73", "marker": "v"},
    "revseg": {"color": "#E69F00", "marker": "s", "linewidth": 2.4},
    "revseg Stack": {"color": "#0072B2", "marker": "D", "linewidth": 2.4},
}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes a PNG.

    Args:
        rows: Of `benchmarks.memory_depth`; those of other shapes than the first, and those not run, are left out.
        path: The file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    shape = rows[0].get("shape")
    rows = [
        row
        for row in rows
        if row["peak_mib"] is not None and row["way"] in STYLES and row.get("shape") == shape
    ]
    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    depths = sorted({row["depth"] for row in rows})
    ends = {}
    for way, style in STYLES.items():
        points = sorted((row["depth"], row["peak_mib"]) for row in rows if row["way"] == way)
        if points:
            axes.plot(*zip(*points, strict=True), **{"linewidth": 1.4, "markersize": 5, **style})
            ends[way] = points[-1][1]
    axes.set(xscale="log", yscale="log", xlabel="depth, blocks", ylabel="peak of a training step, MiB")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    ticks = [2**i for i in range(5, 16) if min(ends.values()) / 2 < 2**i < 2 * max(ends.values())]
    axes.set_yticks(ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    label_ends(axes, ends, {way: style["color"] for way, style in STYLES.items()})
    figure.savefig(path, format="png", dpi=120)
