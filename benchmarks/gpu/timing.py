"""Times of steps that take turns, and the bandwidth that they are held against."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.gpu.setup import Setup
from benchmarks.record import Row
from benchmarks.timing import spread
from revseg.memory import peak_bytes

Step = Callable[[], object]
MIB = 2**20
ROUNDS = 7
TURN = 0.04  # seconds that a step runs before it is another's turn
COPIED = 2**29  # bytes, more than any cache holds


def bandwidth(setup: Setup) -> float:
    """Bytes a second that a copy of a large tensor moves, reads and writes counted."""
    size = 2**16 if setup.toy else COPIED
    x = torch.zeros(size, dtype=torch.uint8, device=setup.device)
    y = torch.empty_like(x)
    found = race({"copy": lambda: y.copy_(x)}, setup)["copy"]
    return 2 * size / (found["ms"]["median"] / 1e3) if "ms" in found else 0.0


def race(steps: Mapping[str, Step], setup: Setup, memory: bool = False) -> dict[str, Row]:
    """For each way its milliseconds a call, by rounds in which all take turns.

    A way that fails has its error instead, and so has one for which no time is left.

    Args:
        steps: A function for each way.
        setup: How the part runs.
        memory: Whether to count the peak of a call too.
    """
    found: dict[str, Row] = {}
    calls: dict[str, int] = {}
    for way, step in steps.items():
        if setup.seconds_left < 5:
            found[way] = {"error": "no time left"}
            continue
        try:
            step()
            if setup.warm:
                continue
            calls[way] = 1 if setup.toy else max(1, round(TURN / _seconds(step, 3, setup)))
            found[way] = {"peak_mib": _peak(step, setup)} if memory else {}
        except Exception as error:  # noqa: BLE001, one way that fails must not take the others with it
            calls.pop(way, None)
            found[way] = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(1 if setup.toy else ROUNDS):
        for way, count in calls.items():
            if setup.seconds_left > 2 or not times[way]:
                times[way].append(1e3 * _seconds(steps[way], count, setup))
    for way, milliseconds in times.items():
        found[way]["ms"] = spread(milliseconds)
    return found


def captured(step: Step) -> Step:
    """The step as a CUDA graph, which is launched as one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _seconds(step: Step, count: int, setup: Setup) -> float:
    _synchronize(setup)
    if setup.device == "cpu":
        started = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - started) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count


def _peak(step: Step, setup: Setup) -> float:
    gc.collect()
    return round(peak_bytes(step, setup.device) / MIB, 2)


def _synchronize(setup: Setup) -> None:
    if setup.device != "cpu":
        torch.cuda.synchronize()
