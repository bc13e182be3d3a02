"""Memory and time of the chain against depth and size, from `results/memory_depth.json` and `results/step_time.json`."""

from collections.abc import Sequence
from typing import Any

from benchmarks.step_time import ONE_MORE

Result = dict[str, Any]
Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

MEMORY_HEAD = """\
## Memory against depth

Peak MiB of one step, forward and backward, beyond what was live before it: parameters, their
gradients, the input and its gradient, and the gradient of the output are not counted; the output
is. In brackets, the MiB that autograd saves in the forward pass. Counted by torch's own allocator
(`revseg.memory.peak_bytes`, `saved_bytes`), so a busy machine gives the same figures.
"""

MEMORY_FOOT = """\
memcnn, revtorch, revlib, invtorch and compiled code keep tensors where a count of saved tensors does not see them.
`save_on_cpu` is plain on a CPU. "Stack" is `revseg.Stack` as f and g, our fused layers; "plain Stack" are the same layers
in ordinary autograd, "compile" is torch.compile of each block, with its activation memory budget at 1 or at 0.
"""

SIZE_HEAD = """\
### Against the size of the images

Peak MiB at depth {depth}, by input. The last column is a chain of {deepest} blocks, for which plain autograd needs more
than this machine has.
"""

TIME_HEAD = """\
## Time of a step

Ratio to the plain step that ran next to it in the same process: median, quartiles in brackets.
A ratio of 1.3 is one more forward pass. The default heap of Linux gives large blocks back to the system,
so the plain step pays page faults for every activation it stores; a heap that keeps its pages does
not, like the caching allocator of a GPU, and is the fairer comparison. "plain, channels_last" is the plain step on
maps in the layout that a CPU's convolutions prefer; chains of revseg go into it by themselves. "plain + forward" is
the plain step and its forward pass once more: what running every function again costs at least.
"""


def by_depth(result: Result) -> list[Row]:
    """The rows of the main shape."""
    shape = result["settings"]["shape"]
    return [row for row in result["rows"] if row.get("shape", shape) == shape]


def memory_table(result: Result) -> Table:
    """Ways down, depths across."""
    rows = by_depth(result)
    depths = _unique(row["depth"] for row in rows)
    cells = {(row["way"], row["depth"]): row for row in rows}
    table = [
        [way, *(_memory_cell(cells.get((way, depth)), True) for depth in depths)]
        for way in _unique(row["way"] for row in rows)
    ]
    return ["", *(f"depth {depth}" for depth in depths)], table


def in_short(result: Result) -> str:
    """One sentence: the peaks at the greatest depth, from the least on."""
    rows = [row for row in by_depth(result) if row["peak_mib"] is not None]
    depth = max(row["depth"] for row in rows)
    shape = " x ".join(map(str, result["settings"]["shape"]))
    deepest = sorted((row for row in rows if row["depth"] == depth), key=lambda row: row["peak_mib"])
    peaks = ", ".join(f"{row['way']} {row['peak_mib']:,.0f}" for row in deepest)
    return (
        f"Peak MiB of a training step of {depth} blocks beyond input, parameters and gradients, input {shape} in "
        f"float32: {peaks}.\n"
    )


def notes(result: Result) -> str:
    """Why rows were not run, a line each; empty if all were."""
    lines = [
        f"{row['way']}, depth {row['depth']}, input {_shape(row, result)}: {row['note']}."
        for row in result["rows"]
        if row["note"]
    ]
    return "\n".join(lines) + "\n" if lines else ""


def flatness(result: Result) -> str:
    """How much the peaks of ours grow from the least depth to the greatest, a sentence."""
    rows = [row for row in by_depth(result) if row["peak_mib"] is not None]
    depths = sorted({row["depth"] for row in rows})
    peaks = {(row["way"], row["depth"]): row["peak_mib"] for row in rows}
    growth = [
        f"{way} {peaks[way, depths[-1]] / peaks[way, depths[0]] - 1:+.2%}"
        for way in ("revseg", "revseg exact", "revseg Stack")
        if {(way, depths[0]), (way, depths[-1])} <= peaks.keys()
    ]
    return (
        f"From depth {depths[0]} to {depths[-1]} the peak grows by: {', '.join(growth)}.\n" if growth else ""
    )


def size_table(result: Result) -> tuple[str, Table] | None:
    """A head, and ways down by sizes across at one depth, then the largest case; None if one size alone was run."""
    rows = [row for row in result["rows"] if row.get("shape", result["settings"]["shape"])]
    main = tuple(result["settings"]["shape"])
    cases = _unique((tuple(row.get("shape", main)), row["depth"]) for row in rows)
    others = [(shape, depth) for shape, depth in cases if shape != main]
    if not others:
        return None
    depth, largest = others[0][1], others[-1]
    chosen = [
        *sorted(case for case in cases if case[1] == depth),
        *([largest] if largest[1] != depth else []),
    ]
    cells = {(row["way"], tuple(row.get("shape", main)), row["depth"]): row for row in rows}
    head = [" x ".join(map(str, shape)) + (f", depth {d}" if d != depth else "") for shape, d in chosen]
    table = [
        [way, *(_memory_cell(cells.get((way, *case)), False) for case in chosen)]
        for way in _unique(row["way"] for row in rows)
    ]
    return SIZE_HEAD.format(depth=depth, deepest=largest[1]), (["", *head], table)


def timed(result: Result) -> list[Row]:
    """The rows of the main function and shape."""
    return [row for row in result["rows"] if row["function"] == "conv pair" and not _other_size(row, result)]


def _other_size(row: Row, result: Result) -> str:
    """Its shape; empty for the main one."""
    return "" if result["settings"].get("shape") in (None, row.get("shape")) else _shape(row, result)


def time_table(result: Result) -> Table:
    """Ways down; depth, threads and heap across, and then the other sizes."""
    rows = [row for row in result["rows"] if row["function"] == "conv pair"]
    rows.sort(key=lambda row: bool(_other_size(row, result)))

    def case_of(row: Row) -> tuple[Any, ...]:
        return row["depth"], row["threads"], row["heap"], _other_size(row, result)

    cases = _unique(map(case_of, rows))
    head = [
        f"depth {d}, {t} thread{'s' * (t > 1)}, heap {h}" + (f", {size}" if size else "")
        for d, t, h, size in cases
    ]
    by_case = {(row["way"], *case_of(row)): row for row in rows}
    seconds = [_plain_seconds([row for row in rows if case_of(row) == case]) for case in cases]
    table = [["plain", *(f"1 ({s:.2f} s)" if s else "not run" for s in seconds)]]
    for way in _unique(row["way"] for row in rows):
        table.append([way, *(_time_cell(by_case.get((way, *case))) for case in cases)])
    return ["", *head], table


def functions_table(result: Result) -> Table | None:
    """Functions other than that of the main workload; None if there are none."""
    rows = [row for row in result["rows"] if row["function"] != "conv pair"]
    if not rows:
        return None
    heaps = _unique(row["heap"] for row in rows)
    by_case = {(row["function"], row["way"], row["heap"]): row for row in rows}
    cases = _unique((row["function"], row["way"], _shape(row, result)) for row in rows)
    table = [
        [function, way, shape, *(_time_cell(by_case.get((function, way, heap))) for heap in heaps)]
        for function, way, shape in cases
    ]
    return ["f and g", "way", f"input (depth {rows[0]['depth']})", *(f"heap {heap}" for heap in heaps)], table


def time_in_short(result: Result) -> str:
    """One sentence: the ratios at the greatest depth, on the heap that keeps its pages, from the least on."""
    # One forward pass more is no way to train.
    rows = [row for row in timed(result) if "ratio" in row and row["way"] != ONE_MORE]
    heap = list(result["settings"]["heaps"])[-1]
    rows = [row for row in rows if row["heap"] == heap and row["threads"] == rows[0]["threads"]]
    depth = max(row["depth"] for row in rows)
    deepest = sorted((row for row in rows if row["depth"] == depth), key=lambda row: row["ratio"]["median"])
    ratios = ", ".join(f"{row['way']} {row['ratio']['median']:.2f}" for row in deepest)
    return f"Time of a step as a multiple of the plain step, depth {depth}: {ratios}.\n"


def _shape(row: Row, result: Result) -> str:
    return " x ".join(map(str, row.get("shape", result["settings"].get("shape"))))


def _memory_cell(row: Row | None, saved: bool) -> str:
    if row is None or row["peak_mib"] is None:
        return "not run"
    kept = f" ({row['saved_mib']:,.0f})" if saved and row["saved_mib"] is not None else ""
    return f"{row['peak_mib']:,.0f}{kept}"


def _time_cell(row: Row | None) -> str:
    if row is None or "ratio" not in row:
        return "not run"
    ratio = row["ratio"]
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _plain_seconds(rows: Sequence[Row]) -> float | None:
    """The median step of the first way that was run: plain ran beside each of them."""
    return next((float(row["plain_s"]) for row in rows if "plain_s" in row), None)


def _unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))
