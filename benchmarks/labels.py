"""The names of curves at their ends, instead of a legend: in order, and apart from each other."""

import math
from typing import Any

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
