"""How does the memory of a training step grow with depth, and with the size of the images?

The peak of one step beyond what was live at its start, and the bytes that autograd saves in the
forward pass. Both are counts of the allocator, the same on a busy machine. The step begins without gradients of
parameters, as after `optimizer.zero_grad()`; those it leaves behind are not counted.

    python -m benchmarks measure memory_depth

With `--missing`, what the file has is not measured again; it must be of the same machine and torch.
"""

import argparse
import gc
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import picture, process, record
from benchmarks.peers import MISSING
from benchmarks.record import Result, Results, Row
from benchmarks.rivals import RIVALS, is_available
from benchmarks.tables import NOT_RUN, Table, markdown, size, source, unique
from benchmarks.ways import WAYS
from benchmarks.workload import SHAPE, workload
from revseg.memory import peak_bytes, saved_bytes

QUESTION = "How does the memory of a training step grow with depth, and with the size of the images?"
ORDER, SHORT_ORDER = 1, 1
# On a CPU `save_on_cpu` is plain. What it keeps, and what compiled code and the rivals but FrEIA do, nobody sees.
ALL = [way for way in WAYS if way not in ("revseg keep=half", "save_on_cpu")]
HIDING = ("save_on_cpu", "compile", "compile budget 0", *(way for way in RIVALS if way != "FrEIA"))
SIZES = ((2, 64, 64, 128), (2, 64, 128, 256), (2, 64, 256, 512))  # at `DEPTH`
DEPTH = 16
# A shape and depth for which plain wants more than a machine of 24 GiB has, and those who do without.
TOO_MUCH = (4, 64, 128, 256), 128
LEAN = ("plain", "revseg", "revseg exact", "revseg Stack", "checkpoint", "memcnn", "revtorch", "revlib")
WARMED = ("compile", "compile budget 0", "revlib")  # ways whose first step takes more
LIMIT_S = 300  # of one step and what comes before it
MIB = 2**20


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 32, 64, 128])
    parser.add_argument("--ways", nargs="+", default=ALL, choices=ALL, metavar="WAY", help=", ".join(ALL))
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE, metavar=("N", "C", "H", "W"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit-gib", type=float, default=16, help="steps that save more are not run")
    parser.add_argument("--depths-only", action="store_true", help="no other sizes")
    parser.add_argument("--missing", action="store_true", help="only what the file lacks")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"shape": list(args.shape), "dtype": "float32", "device": args.device, "function": "conv pair"}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    cases = [(tuple(args.shape), depth) for depth in args.depths]
    if not args.depths_only:
        cases += [(shape, DEPTH) for shape in SIZES if (shape, DEPTH) not in cases]
        cases.append(TOO_MUCH)
    path = args.out / "memory_depth.jsonl"
    earlier = record.earlier_rows(path, settings(args), lambda row: True) if args.missing else []
    found = {(*row["shape"], row["depth"], row["way"]): row for row in earlier}
    for shape, depth in cases:
        for way in args.ways if (shape, depth) != TOO_MUCH else [w for w in args.ways if w in LEAN]:
            case = (*shape, depth, way)
            if case not in found or found[case]["peak_mib"] is None:
                row = found[case] = _alone(way, depth, shape, args.device, args.limit_gib)
                print(", ".join(f"{key} {value}" for key, value in row.items() if value), flush=True)
        yield sorted(found.values(), key=lambda row: _place(row, list(args.shape)))


def _place(row: Row, main_shape: list[int]) -> tuple[Any, ...]:
    """Of a row in the file: the main shape first, which the picture is of."""
    return row["shape"] != main_shape, row["shape"], row["depth"], ALL.index(row["way"])


def rows_of(
    depths: Iterable[int],
    ways: Iterable[str],
    shape: tuple[int, int, int, int] = SHAPE,
    device: str = "cpu",
    limit_gib: float = 16,
) -> list[Row]:
    """One row for each depth and way: way, depth, shape, peak_mib, saved_mib, note.

    Args:
        depths: Numbers of blocks.
        ways: Names in `WAYS`.
        shape: N, C, H, W of the input.
        device: Where it runs.
        limit_gib: Steps whose saved tensors alone would take more are not run.
    """
    return [row_of(way, depth, shape, device, limit_gib) for depth in depths for way in ways]


def row_of(way: str, depth: int, shape: tuple[int, int, int, int], device: str, limit_gib: float) -> Row:
    """The row of one way at one depth."""
    row: Row = {"way": way, "depth": depth, "shape": list(shape)}
    row |= {"peak_mib": None, "saved_mib": None, "note": ""}
    if not is_available(way):
        return row | {"note": MISSING}
    if way not in HIDING:
        # On the meta device nothing is allocated, so that this tells whether the step can be run at all.
        row["saved_mib"] = round(
            saved_bytes(workload(way, depth, shape=shape, device="meta").forward) / MIB, 2
        )
        limit_mib = limit_gib * 1024 if device != "cpu" else min(limit_gib * 1024, _free_mib())
        if row["saved_mib"] > 0.95 * limit_mib:
            return row | {"note": f"not run: {row['saved_mib']:,.0f} MiB to save, {limit_mib:,.0f} allowed"}
    work = workload(way, depth, shape=shape, device=device)
    # On a GPU the first step also makes workspaces. On a CPU most ways have steps alike, and steps are slow.
    if device != "cpu" or way in WARMED:
        work.step()
    work.functions.zero_grad()
    peak = peak_bytes(work.step, device)
    left = sum(p.grad.nbytes for p in work.functions.parameters() if p.grad is not None)
    row["peak_mib"] = round((peak - left) / MIB, 2)
    del work
    gc.collect()
    return row


def _alone(way: str, depth: int, shape: tuple[int, ...], device: str, limit_gib: float) -> Row:
    """The row, found in a process of its own."""
    found, end = process.run(_job, way, depth, shape, device, limit_gib, limit=LIMIT_S)
    empty = {"way": way, "depth": depth, "shape": list(shape), "peak_mib": None, "saved_mib": None}
    row: Row = found[0] if found else empty | {"note": f"not run: {end}"}
    return row


def _job(way: str, depth: int, shape: list[int], device: str, limit_gib: float) -> Iterator[Row]:
    n, c, h, w = shape
    yield row_of(way, depth, (n, c, h, w), device, limit_gib)


def _free_mib() -> float:
    """The memory that new tensors may take."""
    for line in Path("/proc/meminfo").read_text().splitlines() if os.path.exists("/proc/meminfo") else []:
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 1024
    return float("inf")


HEAD = """\
## Memory against depth

Peak MiB of one step, forward and backward, beyond what was live before it: parameters, their
gradients, the input and its gradient, and the gradient of the output are not counted; the output
is. In brackets, the MiB that autograd saves in the forward pass. Counted by torch's own allocator
(`revseg.memory.peak_bytes`, `saved_bytes`), so a busy machine gives the same figures.
"""

FOOT = """\
memcnn, revtorch, revlib, invtorch and compiled code keep tensors where a count of saved tensors does not see them.
`save_on_cpu` is plain on a CPU. "Stack" is `revseg.Stack` as f and g, our fused layers; "plain Stack" are the same layers
in ordinary autograd, "compile" is torch.compile of each block, with its activation memory budget at 1 or at 0.
"""

SIZE_HEAD = """\
### Against the size of the images

Peak MiB at depth {depth}, by input. The last column is a chain of {deepest} blocks, for which plain autograd needs more
than this machine has.
"""

PICTURE = "![Peak memory of a training step against depth](results/memory_depth.png)\n"


def sections(results: Results) -> list[str]:
    result = results.get("memory_depth")
    if not result:
        return []
    parts = [HEAD, markdown(table(result)), flatness(result), FOOT]
    if sizes := size_table(result):
        parts += [sizes[0], markdown(sizes[1])]
    return [*parts, notes(result), source(result)]


def in_short(results: Results) -> list[str]:
    result = results.get("memory_depth")
    if not result or not (results.folder / "memory_depth.png").is_file():
        return []
    rows = [row for row in by_depth(result) if row["peak_mib"] is not None]
    depth = max(row["depth"] for row in rows)
    deepest = sorted((row for row in rows if row["depth"] == depth), key=lambda row: row["peak_mib"])
    peaks = ", ".join(f"{row['way']} {row['peak_mib']:,.0f}" for row in deepest)
    said = (
        f"Peak MiB of a training step of {depth} blocks beyond input, parameters and gradients, input "
        f"{size(result['settings']['shape'])} in float32: {peaks}.\n"
    )
    return [PICTURE, said]


def draw(result: Result, path: Path) -> None:
    """The peaks of the main shape against depth, everybody's."""
    figure, (axes,) = picture.panels(1, 8.6)
    curves: dict[str, dict[int, float]] = {}
    for row in by_depth(result):
        if row["peak_mib"] is not None:
            curves.setdefault(row["way"], {})[row["depth"]] = row["peak_mib"]
    picture.against_depth(axes, curves, "peak of a training step, MiB")
    picture.in_mib(axes)
    picture.save(figure, path)


def by_depth(result: Result) -> list[Row]:
    """The rows of the main shape."""
    shape = result["settings"]["shape"]
    return [row for row in result["rows"] if row.get("shape", shape) == shape]


def table(result: Result) -> Table:
    """Ways down, depths across."""
    rows = by_depth(result)
    depths = unique(row["depth"] for row in rows)
    cells = {(row["way"], row["depth"]): row for row in rows}
    lines = [
        [way, *(_cell(cells.get((way, depth)), True) for depth in depths)]
        for way in unique(row["way"] for row in rows)
    ]
    return ["", *(f"depth {depth}" for depth in depths)], lines


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
    cases = unique((tuple(row.get("shape", main)), row["depth"]) for row in rows)
    others = [(shape, depth) for shape, depth in cases if shape != main]
    if not others:
        return None
    depth, largest = others[0][1], others[-1]
    chosen = [
        *sorted(case for case in cases if case[1] == depth),
        *([largest] if largest[1] != depth else []),
    ]
    cells = {(row["way"], tuple(row.get("shape", main)), row["depth"]): row for row in rows}
    head = [size(shape) + (f", depth {d}" if d != depth else "") for shape, d in chosen]
    lines = [
        [way, *(_cell(cells.get((way, *case)), False) for case in chosen)]
        for way in unique(row["way"] for row in rows)
    ]
    return SIZE_HEAD.format(depth=depth, deepest=largest[1]), (["", *head], lines)


def _shape(row: Row, result: Result) -> str:
    return size(row.get("shape", result["settings"].get("shape")))


def _cell(row: Row | None, saved: bool) -> str:
    if row is None or row["peak_mib"] is None:
        return NOT_RUN
    kept = f" ({row['saved_mib']:,.0f})" if saved and row["saved_mib"] is not None else ""
    return f"{row['peak_mib']:,.0f}{kept}"
