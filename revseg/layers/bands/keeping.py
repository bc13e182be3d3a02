"""Which raw maps the way back of a row of layers keeps, where there is room for some at a time.

The pass for layer j makes raw maps j - 1 and j once more, from the nearest one that is kept, or from the input; then nobody reads
map j again. So where map j was kept, its room is free for another one of those that the pass makes anyway. What is kept when follows from
the fewest runs of layers: the reversal of a chain with some of its states stored (Griewank and Walther, "Revolve", 2000).
"""

from __future__ import annotations

from functools import cache


@cache
def kept_maps(layers: int, room: int) -> tuple[tuple[int, ...], ...]:
    """The maps that are kept as they are made: by the run before the passes, then by the pass of each layer, 1 first.

    Args:
        layers: Of the row.
        room: Maps that may be there at a time, without the last one.
    """
    before = there = _now(0, layers, room)
    by_pass: list[tuple[int, ...]] = []
    for j in range(layers, 0, -1):
        there = tuple(m for m in there if m < j)
        nearest = max(there, default=0)
        made = _now(nearest, j - 1 - nearest, room - len(there))
        by_pass.append(made)
        there += made
    return before, *reversed(by_pass)


def _now(nearest: int, layers: int, room: int) -> tuple[int, ...]:
    """What is kept by a run over so many layers behind the nearest map that is there."""
    m = _fewest(layers, room)[1]
    return (nearest + m, *_now(nearest + m, layers - m, room - 1)) if m else ()


@cache
def _fewest(layers: int, room: int) -> tuple[int, int]:
    """Runs of layers in the passes for so many, all of which run before, and the first map that this run keeps; 0 for none."""
    if not layers:
        return 0, 0
    found = [(layers + _fewest(layers - 1, room)[0], 0)]
    if room:
        found += [
            (_fewest(layers - m, room - 1)[0] + m - 1 + _fewest(m - 1, room)[0], m)
            for m in range(1, layers + 1)
        ]
    return min(found)
