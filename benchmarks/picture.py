"""Pictures of curves: one style for each way, and names at their ends instead of a legend."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Ours in blues and orange, PyTorch's in greys, the rivals' in greens and pinks, which the colour-blind can tell
# apart; markers and names say it again.
STYLES: dict[str, dict[str, Any]] = {
    "plain": {"color": "black", "marker": "o", "markersize": 9, "markerfacecolor": "none"},
    "FrEIA": {"color": "#999933", "marker": "x"},
    "compile": {"color": "#777777", "marker": "*"},
    "checkpoint": {"color": "#555555", "marker": "P"},
    "checkpoint sqrt": {"color": "#999999", "marker": "X"},
    "memcnn": {"color": "#CC79A7", "marker": "^"},
    "invtorch": {"color": "#AA4499", "marker": "<"},
    "revlib": {"color": "#117733", "marker": ">"},
    "revtorch": {"color": "#009E73", "marker": "v"},
    "revseg": {"color": "#E69F00", "marker": "s", "linewidth": 2.4},
    "revseg exact": {"color": "#56B4E9", "marker": "D"},
    "revseg lossless": {"color": "#0072B2", "marker": "."},
    "revseg Stack": {"color": "#0072B2", "marker": "d", "linewidth": 2.4},
}
GAP = 0.062  # between the labels of neighbours, of the height of a panel


def label_ends(axes: Any, ends: dict[str, float], colours: dict[str, str]) -> None:
    """Writes each name to the right of the panel, beside the last value of its curve.

    Args:
        axes: A panel with a logarithmic y axis, whose limits are set.
        ends: By name: the last value.
        colours: By name.
    """
    low, high = (math.log(limit) for limit in axes.get_ylim())
    heights = {name: (math.log(value) - low) / (high - low) for name, value in ends.items()}
    for name, place in _spread(heights).items():
        line = {"arrowstyle": "-", "color": colours[name], "alpha": 0.5, "relpos": (0, 0.5)}
        axes.annotate(
            name, (1.0, heights[name]), (1.03, place), "axes fraction", "axes fraction", color=colours[name],
            va="center", arrowprops=line | {"shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def _spread(heights: dict[str, float]) -> dict[str, float]:
    """Places near the heights, in their order, that leave a gap between neighbours."""
    order = sorted(heights, key=heights.__getitem__)
    places: list[float] = []
    for way in order:
        places.append(max(heights[way], places[-1] + GAP) if places else heights[way])
    for i in reversed(range(len(places))):  # what was pushed over the top comes down again
        places[i] = min(places[i], 1.0 - GAP * (len(places) - 1 - i))
    return dict(zip(order, places, strict=True))


def panels(count: int, width: float = 5.9, height: float = 4.8, rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure for a file, and its panels: so many side by side, in rows; inches of a panel's width, of all rows' height."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, count, squeeze=False).flat)


def against_depth(axes: Any, curves: dict[str, dict[int, float]], label: str) -> None:
    """Both axes logarithmic: a curve for each way, its name at its end.

    Args:
        axes: The panel.
        curves: By way of `STYLES`: values by depth.
        label: What the values are.
    """
    from matplotlib.ticker import NullLocator

    ends, colours = {}, {}
    for way, style in STYLES.items():
        if points := sorted(curves.get(way, {}).items()):
            axes.plot(*zip(*points, strict=True), **{"linewidth": 1.5, "markersize": 5, **style})
            ends[way], colours[way] = points[-1][1], style["color"]
    depths = sorted({depth for way in ends for depth in curves[way]})
    values = [math.log(value) for way in ends for value in curves[way].values()]
    margin = 0.08 * (max(values) - min(values)) + 0.1
    axes.set(xscale="log", yscale="log", xlabel="depth, blocks", ylabel=label)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(depths[0] * 0.9, depths[-1] * 1.1)
    axes.set_ylim(math.exp(min(values) - margin), math.exp(max(values) + margin))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    label_ends(axes, ends, colours)


def scatter(
    axes: Any, points: dict[str, tuple[float, float]], front: Sequence[str], labels: tuple[str, str]
) -> None:
    """A named point for each way, the front as a line.

    Args:
        axes: The panel.
        points: By way: what stands on the x axis and on the y axis, which is logarithmic.
        front: The ways on the front, in order.
        labels: Of the two axes.
    """
    for way, (x, y) in points.items():
        ours = way.startswith("revseg")
        colour = "#0072B2" if ours else "#555555"
        axes.plot([x], [y], marker="D" if ours else "o", color=colour, markersize=5)
        axes.annotate(way, (x, y), (4, 3), textcoords="offset points", color=colour, fontsize=7)
    axes.plot(*zip(*(points[way] for way in front), strict=True), color="#E69F00", linewidth=1.2, zorder=0)
    axes.set(yscale="log", xlabel=labels[0], ylabel=labels[1])
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def in_mib(axes: Any) -> None:
    """The y axis in powers of two."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    low, high = axes.get_ylim()
    axes.set_yticks([2**i for i in range(-10, 20) if low < 2**i < high])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.7g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def save(figure: Any, path: Path) -> None:
    """Writes a PNG."""
    figure.savefig(path, format="png", dpi=120)
