"""How long does a training step take, against plain autograd?

Each way is timed in turn with the plain twin in the same process, and the order changes from round
to round; a ratio is that of two neighbours, so that a machine which slows down slows both.

The heap decides how much of this is real. By default malloc gives large blocks back to the
system, and the plain step then pays page faults for every activation it stores: reversible ways look
faster than they are. With a heap that keeps its pages, as the caching allocator of a GPU does, this
cost is gone. Both are reported. The settings of the heap are read when a process starts, so every
case is a process of its own.

    python -m benchmarks.step_time --threads 1 2 --depths 4 --deep 16

The other sizes are timed at the first depth, with the first thread count and the last heap.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.functions import FUNCTIONS
from benchmarks.rivals import is_available
from benchmarks.ways import WAYS
from benchmarks.workload import SHAPE, Workload, workload

QUESTION = "How long does a training step take, against plain autograd?"
HEAPS: dict[str, dict[str, str]] = {
    "default": {},
    "keeps pages": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"},
}
ONE_MORE = "plain + forward"  # what running every function again costs at least
SIZES = ((2, 64, 64, 128), (2, 64, 256, 512))  # beside the main one
LAST = ", channels_last"  # behind a way: on maps and weights in that layout
ALL = [
    *(way for way in WAYS if way not in ("plain", "save_on_cpu")),  # on a CPU `save_on_cpu` is plain
    *(way + LAST for way in ("plain", "plain Stack", "revseg Stack")),
    ONE_MORE,
]


def measure(
    depth: int,
    ways: Sequence[str],
    rounds: int,
    function: str = "conv pair",
    shape: tuple[int, int, int, int] = SHAPE,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """One row for each way: the ratios of its step to the plain step next to it.

    Args:
        depth: The number of blocks.
        ways: Names in `WAYS`, with `LAST` behind them for the other layout; `ONE_MORE`.
        rounds: How often each way is timed, after a warm-up.
        function: A name in `FUNCTIONS`.
        shape: N, C, H, W of the input.
        device: Where it runs.

    Returns:
        Rows of way, depth, function, rounds, plain_s (median seconds of the plain step), ratio and
        cpu_ratio (wall clock and processor time): median, quartiles, least and greatest.
    """
    plain = workload("plain", depth, function, shape, device)
    others = {
        way: _OneMore(**vars(plain)) if way == ONE_MORE else _workload(way, depth, function, shape, device)
        for way in ways
        if is_available(way)
    }
    for work in (plain, *others.values()):
        _time(work)
    pairs: dict[str, list[tuple[tuple[float, float], tuple[float, float]]]] = {way: [] for way in others}
    for i in range(rounds):
        for way in list(others) if i % 2 == 0 else reversed(others):
            if i % 2 == 0:
                a, b = _time(plain), _time(others[way])
            else:
                b, a = _time(others[way]), _time(plain)
            pairs[way].append((a, b))

    rows = []
    for way in ways:
        row: dict[str, Any] = {"way": way, "depth": depth, "function": function, "rounds": rounds}
        if way not in others:
            rows.append(row | {"note": "not installed: python -m benchmarks.peers"})
            continue
        seconds = [a[0] for a, _ in pairs[way]]
        row["plain_s"] = round(statistics.median(seconds), 4)
        row["ratio"] = spread([b[0] / a[0] for a, b in pairs[way]])
        row["cpu_ratio"] = spread([b[1] / a[1] for a, b in pairs[way]])
        rows.append(row)
    return rows


class _OneMore(Workload):
    """The plain step, and the forward pass once more, without a graph."""

    def step(self) -> None:
        super().step()
        with torch.no_grad():
            self.forward()


def _workload(way: str, *args: Any) -> Workload:
    layout = torch.channels_last if way.endswith(LAST) else torch.contiguous_format
    return workload(way.removesuffix(LAST), *args, layout=layout)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and greatest of one or more values."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    )
    named = {"median": median, "low": low, "high": high, "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in named.items()}


def _time(work: Workload) -> tuple[float, float]:
    """Seconds of one step, on the wall clock and of the processor."""
    gc.collect()
    _synchronize(work)
    wall, cpu = time.perf_counter(), time.process_time()
    work.step()
    _synchronize(work)
    return time.perf_counter() - wall, time.process_time() - cpu


def _synchronize(work: Workload) -> None:
    if work.x.is_cuda:
        torch.cuda.synchronize(work.x.device)


def in_new_process(heap: str, threads: int, case: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `measure(**case)` in a process with that heap and thread count."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    environment |= HEAPS[heap] | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    job = json.dumps(case | {"threads": threads})
    command = [sys.executable, "-m", "benchmarks.step_time", "--job", job]
    answer = subprocess.run(
        command, env=environment, cwd=record.ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    rows: list[dict[str, Any]] = json.loads(answer.stdout.splitlines()[-1])
    return [row | {"heap": heap, "threads": threads} for row in rows]


def _job(job: dict[str, Any]) -> None:
    torch.set_num_threads(job.pop("threads"))
    job["shape"] = tuple(job["shape"])
    print(json.dumps(measure(**job)))


def _print(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        case = (
            f"{row['heap']:11}  {row['threads']} threads  depth {row['depth']:3}  {row['function']:17}"
            f"  {row['way']:16}"
        )
        if "ratio" in row:
            ratio = row["ratio"]
            print(f"{case}  {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})", flush=True)
        else:
            print(f"{case}  {row['note']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--heaps", nargs="+", default=list(HEAPS), choices=list(HEAPS))
    parser.add_argument("--depths", type=int, nargs="*", default=[4], help="with all threads and heaps")
    parser.add_argument(
        "--deep", type=int, nargs="*", default=[16], help="with the first thread count and last heap only"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--deep-rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=ALL, choices=ALL, metavar="WAY", help=", ".join(ALL))
    parser.add_argument("--functions", nargs="*", default=list(FUNCTIONS)[1:], choices=list(FUNCTIONS))
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE, metavar=("N", "C", "H", "W"))
    parser.add_argument("--depths-only", action="store_true", help="no other sizes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        _job(json.loads(args.job))
        return

    main_case = {"ways": args.ways, "rounds": args.rounds, "shape": args.shape, "device": args.device}
    deep_case = main_case | {"rounds": args.deep_rounds}
    any_case = main_case | {"ways": ["revseg", "revseg Stack", "plain Stack", "plain" + LAST, ONE_MORE]}
    cases: list[tuple[str, int, dict[str, Any]]] = []
    for depth in args.depths:
        cases += [(h, t, main_case | {"depth": depth}) for h in args.heaps for t in args.threads]
    cases += [(args.heaps[-1], args.threads[0], deep_case | {"depth": depth}) for depth in args.deep]
    cases += [
        (heap, args.threads[0], any_case | {"depth": 4, "function": function})
        for function in args.functions
        for heap in args.heaps
    ]
    cases += [
        (args.heaps[-1], args.threads[0], deep_case | {"depth": args.depths[0], "shape": list(shape)})
        for shape in ([] if args.depths_only or not args.depths else SIZES)
    ]
    settings = {"dtype": "float32", "device": args.device, "heaps": HEAPS, "shape": list(args.shape)}
    rows: list[dict[str, Any]] = []
    for heap, threads, case in cases:
        new = in_new_process(heap, threads, case)
        _print(new)
        rows += [row | {"shape": list(case["shape"])} for row in new]
        path = record.write("step_time", QUESTION, rows, settings, args.out)
    print("wrote", path)


if __name__ == "__main__":
    main()
