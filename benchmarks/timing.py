"""Times of steps: what is said of a row of them, and the heaps they are taken on.

The heap decides how much of a time is real. By default malloc gives large blocks back to the system, and a
step that stores activations then pays page faults for each. With a heap that keeps its pages, as the caching
allocator of a GPU does, this cost is gone. The settings are read when a process starts.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch

HEAPS: dict[str, dict[str, str]] = {
    "default": {},
    "keeps pages": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"},
}


def environment(heap: str, threads: int) -> dict[str, str]:
    """Of a process on that heap, with so many threads."""
    found = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    return found | HEAPS[heap] | {"OMP_NUM_THREADS": str(threads)}


def seconds(step: Callable[[], object]) -> float:
    """Of one call, by the clock on the wall."""
    gc.collect()
    _finish()
    started = time.perf_counter()
    step()
    _finish()
    return time.perf_counter() - started


def _finish() -> None:
    """Waits for what a GPU still does."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def in_turns(
    plain: Callable[[], object], other: Callable[[], object], rounds: int
) -> list[tuple[float, float]]:
    """Seconds of two neighbours in every round, whose order changes from round to round."""
    pairs = []
    for i in range(rounds):
        order = [plain, other] if i % 2 == 0 else [other, plain]
        took = [seconds(step) for step in order]
        pairs.append((took[i % 2], took[1 - i % 2]))
    return pairs


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and greatest of one or more values."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    )
    named = {"median": median, "low": low, "high": high, "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in named.items()}
