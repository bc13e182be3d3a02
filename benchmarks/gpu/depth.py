"""The chain of `benchmarks.workload` on a GPU, by every way that is installed: memory against depth, and time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.gpu.setup import Setup
from benchmarks.questions import memory_depth, step_time
from benchmarks.record import Row
from benchmarks.rivals import is_available
from benchmarks.ways import WAYS
from benchmarks.workload import SHAPE

DEPTHS = (4, 16, 64)
TIMED = 16  # blocks of the step that is timed
ROUNDS = 5
LIMIT_GIB = 60.0
TOY = (1, 8, 6, 10)


def measure(setup: Setup) -> Iterator[Row]:
    """Peaks of a training step at each depth, then its time as a multiple of the plain step next to it."""
    shape, depths = (TOY, (1, 2)) if setup.toy else (SHAPE, DEPTHS)
    ways = [way for way in WAYS if is_available(way) and not (setup.toy and way.startswith("compile"))]
    for depth in depths:
        for way in ways:
            peaks = partial(memory_depth.rows_of, [depth], [way], shape, setup.device, LIMIT_GIB)
            yield from _tried(peaks, setup, {"case": "peak", "way": way, "depth": depth})
    depth, rounds = (depths[-1], 1) if setup.toy else (TIMED, ROUNDS)
    for way in ways[1:]:  # the first is plain
        times = partial(step_time.ratios, depth, [way], rounds, shape=shape, device=setup.device)
        yield from _tried(times, setup, {"case": "time", "way": way, "depth": depth})


def _tried(make: Callable[[], list[Row]], setup: Setup, case: Row) -> list[Row]:
    if setup.seconds_left < 5:
        return [case | {"error": "no time left"}]
    try:
        return [case | row for row in make()]
    except Exception as error:  # noqa: BLE001, a rival may raise anything on another device
        return [case | {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}]
