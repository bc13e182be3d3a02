"""Which raw maps the way back of a row keeps: the fewest runs of layers that its room allows."""

from functools import cache
from itertools import chain, combinations

import pytest

from revseg.layers.bands.keeping import kept_maps

ROWS = [(layers, room) for layers in range(1, 8) for room in range(4)]


@cache
def fewest(j: int, there: frozenset[int], room: int) -> int:
    """Runs of layers in passes j to 1, tried out: any maps that a pass makes may be kept, where there is room."""
    if j == 0:
        return 0
    own, there = j in there, there - {j}
    nearest = max(there, default=0)
    runs = j - 1 - nearest + (not own)
    made = range(nearest + 1, j)
    free = room - len(there)
    choices = chain.from_iterable(combinations(made, k) for k in range(free + 1))
    return runs + min(fewest(j - 1, there | set(choice), room) for choice in choices)


def runs_of(layers: int, room: int) -> int:
    """Runs of layers in the passes, with what is said to be kept; nothing is kept that is not made, nor too much."""
    before, *by_pass = kept_maps(layers, room)
    there, runs = set(before), 0
    assert len(there) <= room
    for j in range(layers, 0, -1):
        own = j in there
        there.discard(j)
        nearest = max(there, default=0)
        runs += j - 1 - nearest + (not own)
        assert all(nearest < m < j for m in by_pass[j - 1])
        there |= {*by_pass[j - 1]}
        assert len(there) <= room
    return runs


@pytest.mark.parametrize(("layers", "room"), ROWS)
def test_no_other_choice_takes_fewer_runs(layers: int, room: int) -> None:
    first = chain.from_iterable(combinations(range(1, layers + 1), k) for k in range(room + 1))
    assert runs_of(layers, room) == min(fewest(layers, frozenset(choice), room) for choice in first)


def test_without_room_nothing_is_kept() -> None:
    assert kept_maps(6, 0) == ((),) * 7
    assert runs_of(6, 0) == 21
