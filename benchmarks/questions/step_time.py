"""How long does a training step take, against plain autograd?

Each way is timed in turn with the plain twin in the same process, and the order changes from round
to round; a ratio is that of two neighbours, so that a machine which slows down slows both. On two heaps
(`benchmarks.timing`), and every case in a process of its own.

    python -m benchmarks measure step_time --threads 1 2 --depths 4 --deep 16

The other sizes are timed at the first depth, with the first thread count and the last heap.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import process
from benchmarks.functions import FUNCTIONS
from benchmarks.peers import MISSING
from benchmarks.record import Result, Results, Row
from benchmarks.rivals import is_available
from benchmarks.tables import NOT_RUN, Table, markdown, quartiles, size, source, thread_count, unique
from benchmarks.timing import HEAPS, environment, spread
from benchmarks.ways import WAYS
from benchmarks.workload import SHAPE, Workload, workload

QUESTION = "How long does a training step take, against plain autograd?"
ORDER, SHORT_ORDER = 2, 2
ONE_MORE = "plain + forward"  # what running every function again costs at least
SIZES = ((2, 64, 64, 128), (2, 64, 256, 512))  # beside the main one
LAST = ", channels_last"  # behind a way: on maps and weights in that layout
ALL = [
    *(way for way in WAYS if way not in ("plain", "save_on_cpu")),  # on a CPU `save_on_cpu` is plain
    *(way + LAST for way in ("plain", "plain Stack", "revseg Stack")),
    ONE_MORE,
]


def add_options(parser: argparse.ArgumentParser) -> None:
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


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": "float32", "device": args.device, "heaps": HEAPS, "shape": list(args.shape)}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    rows: list[Row] = []
    for heap, threads, case in _cases(args):
        found, end = process.run(_job, threads, case, environment=environment(heap, threads))
        if end:
            raise RuntimeError(f"{case} on heap {heap!r}: {end}")
        for row in found:
            rows.append(row | {"heap": heap, "threads": threads, "shape": list(case["shape"])})
            print(heap, f"{threads} threads", *row.values(), sep="  ", flush=True)
        yield rows


def _cases(args: argparse.Namespace) -> list[tuple[str, int, dict[str, Any]]]:
    """Heap, threads and what `ratios` is told."""
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
    return cases


def _job(threads: int, case: dict[str, Any]) -> Iterator[Row]:
    torch.set_num_threads(threads)
    yield from ratios(**case | {"shape": tuple(case["shape"])})


def ratios(
    depth: int,
    ways: Sequence[str],
    rounds: int,
    function: str = "conv pair",
    shape: tuple[int, int, int, int] = SHAPE,
    device: str = "cpu",
) -> list[Row]:
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
        row: Row = {"way": way, "depth": depth, "function": function, "rounds": rounds}
        if way not in others:
            rows.append(row | {"note": MISSING})
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


HEAD = """\
## Time of a step

Ratio to the plain step that ran next to it in the same process: median, quartiles in brackets.
A ratio of 1.3 is one more forward pass. The default heap of Linux gives large blocks back to the system,
so the plain step pays page faults for every activation it stores; a heap that keeps its pages does
not, like the caching allocator of a GPU, and is the fairer comparison. "plain, channels_last" is the plain step on
maps in the layout that a CPU's convolutions prefer; chains of revseg go into it by themselves. "plain + forward" is
the plain step and its forward pass once more: what running every function again costs at least.
"""


def sections(results: Results) -> list[str]:
    result = results.get("step_time")
    if not result:
        return []
    parts = [HEAD, markdown(table(result)), source(result)]
    if functions := functions_table(result):
        parts += ["### With other functions in the couplings\n", markdown(functions), source(result)]
    return parts


def in_short(results: Results) -> list[str]:
    """One sentence: the ratios at the greatest depth, on the heap that keeps its pages, from the least on."""
    result = results.get("step_time")
    if not result:
        return []
    # One forward pass more is no way to train.
    rows = [row for row in timed(result) if "ratio" in row and row["way"] != ONE_MORE]
    heap = list(result["settings"]["heaps"])[-1]
    rows = [row for row in rows if row["heap"] == heap and row["threads"] == rows[0]["threads"]]
    depth = max(row["depth"] for row in rows)
    deepest = sorted((row for row in rows if row["depth"] == depth), key=lambda row: row["ratio"]["median"])
    listed = ", ".join(f"{row['way']} {row['ratio']['median']:.2f}" for row in deepest)
    return [f"Time of a step as a multiple of the plain step, depth {depth}: {listed}.\n"]


def timed(result: Result) -> list[Row]:
    """The rows of the main function and shape."""
    return [row for row in result["rows"] if row["function"] == "conv pair" and not _other_size(row, result)]


def _other_size(row: Row, result: Result) -> str:
    """Its shape; empty for the main one."""
    return "" if result["settings"].get("shape") in (None, row.get("shape")) else size(row["shape"])


def table(result: Result) -> Table:
    """Ways down; depth, threads and heap across, and then the other sizes."""
    rows = [row for row in result["rows"] if row["function"] == "conv pair"]
    rows.sort(key=lambda row: bool(_other_size(row, result)))

    def case_of(row: Row) -> tuple[Any, ...]:
        return row["depth"], row["threads"], row["heap"], _other_size(row, result)

    cases = unique(map(case_of, rows))
    head = [
        f"depth {d}, {thread_count(t)}, heap {h}" + (f", {size}" if size else "") for d, t, h, size in cases
    ]
    by_case = {(row["way"], *case_of(row)): row for row in rows}
    seconds = [_plain_seconds([row for row in rows if case_of(row) == case]) for case in cases]
    lines = [["plain", *(f"1 ({s:.2f} s)" if s else NOT_RUN for s in seconds)]]
    for way in unique(row["way"] for row in rows):
        lines.append([way, *(_cell(by_case.get((way, *case))) for case in cases)])
    return ["", *head], lines


def functions_table(result: Result) -> Table | None:
    """Functions other than that of the main workload; None if there are none."""
    rows = [row for row in result["rows"] if row["function"] != "conv pair"]
    if not rows:
        return None
    heaps = unique(row["heap"] for row in rows)
    by_case = {(row["function"], row["way"], row["heap"]): row for row in rows}
    cases = unique((row["function"], row["way"], size(row["shape"])) for row in rows)
    lines = [
        [function, way, shape, *(_cell(by_case.get((function, way, heap))) for heap in heaps)]
        for function, way, shape in cases
    ]
    return ["f and g", "way", f"input (depth {rows[0]['depth']})", *(f"heap {heap}" for heap in heaps)], lines


def _cell(row: Row | None) -> str:
    return quartiles(row["ratio"] if row and "ratio" in row else None)


def _plain_seconds(rows: Sequence[Row]) -> float | None:
    """The median step of the first way that was run: plain ran beside each of them."""
    return next((float(row["plain_s"]) for row in rows if "plain_s" in row), None)
