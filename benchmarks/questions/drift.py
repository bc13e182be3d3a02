"""How far off are the gradients of a reversible network, and where are they bitwise plain autograd's?

The error of all parameter gradients together, relative L2, on the blocks of the main workload at a
small size, where plain rounding crosses few kinks of PReLU. Against two truths, both in float64:

- the network as it ran: the gradient at the very streams of the forward pass, each of which float64
  is handed after its update. What is left is the error of the backward pass. "revseg exact" rounds
  its streams to 2^-12 and "revseg Stack" has layers of its own: both are held against their own streams, the
  others against those of plain float32;
- the ordinary network from the input on. This counts the rounding of the forward pass as well, so
  that of "revseg exact", which is another network by that rounding.

And each way is held bit for bit against its plain twin in the same precision: output, gradients of
input and parameters, running statistics.

    python -m benchmarks measure drift
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import picture
from benchmarks.gradients import SHAPE, Case
from benchmarks.peers import MISSING
from benchmarks.questions import memory_depth, step_time
from benchmarks.record import Result, Results, Row
from benchmarks.rivals import is_available
from benchmarks.tables import NOT_RUN, Table, markdown, size, source, thread_count, unique

QUESTION = (
    "How far off are the gradients of a reversible network, and where are they bitwise plain autograd's?"
)
ORDER, SHORT_ORDER = 4, 7
DEPTHS = [1, 2, 4, 8, 16, 32, 64, 100]
# Those that reconstruct; the others' gradients are plain's.
ALL = [
    *("plain", "revseg", "revseg exact", "revseg lossless", "revseg Stack"),
    *("memcnn", "revtorch", "revlib", "invtorch", "momentumnet"),
]
DTYPES = {"float32": None, "bfloat16 autocast": torch.bfloat16}
IN_SHORT = (16, 32, 100)  # depths
DEFAULT, EXACT = "revseg", ("revseg exact", "revseg lossless")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--ways", nargs="+", default=ALL, choices=ALL, metavar="WAY", help=", ".join(ALL))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE, metavar=("N", "C", "H", "W"))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"shape": list(args.shape), "seeds": args.seeds, "threads": 1, "function": "conv pair"}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    torch.set_num_threads(1)
    rows: list[Row] = []
    for depth in args.depths:
        rows += (new := errors(depth, args.ways, args.seeds, tuple(args.shape)))
        print(*new, sep="\n", flush=True)
        yield rows


def errors(
    depth: int, ways: Sequence[str], seeds: int, shape: tuple[int, int, int, int] = SHAPE
) -> list[Row]:
    """One row for each precision and way.

    Args:
        depth: The number of blocks.
        ways: Names in `WAYS`.
        seeds: How many draws of weights and data.
        shape: N, C, H, W of the input.

    Returns:
        Rows of way, depth, dtype, note; error (against the network as it ran) and ordinary_error,
        medians over the seeds; equal and tensors, counts over all seeds.
    """
    rows = []
    present = [way for way in ways if is_available(way)]
    for name, dtype in DTYPES.items():
        found = [Case(depth, dtype, shape, seed).compare(present) for seed in range(seeds)]
        for way in ways:
            row: Row = {"way": way, "depth": depth, "dtype": name, "note": ""}
            if way not in present:
                rows.append(row | {"note": MISSING})
                continue
            for key in ("error", "ordinary_error"):
                row[key] = float(f"{statistics.median(each[way][key] for each in found):.3g}")
            for key in ("equal", "tensors"):
                row[key] = sum(each[way][key] for each in found)
            rows.append(row)
    return rows


COST_HEAD = """\
### What exact inversion costs

As multiples of the default engine ("revseg"), from the two tables above. What "revseg lossless" needs more
memory for are its residues, which grow with depth.
"""

DRIFT_HEAD = """\
## Gradients against depth

Error of all parameter gradients together, relative L2, at {shape}, median of {seeds} draws of weights and
data. First against the network as it ran: float64 at the very streams of the forward pass, so that what is
left is the error of the backward pass. In brackets against the ordinary network in float64 from the input on,
which counts the rounding of the forward pass too; "revseg exact" rounds its streams to 2^-12, which is
another network by that much, and its twin on that grid has the same gradients to the bit. The last column
counts tensors that are bitwise those of the plain twin in the same precision, at all depths: outputs,
gradients, running statistics.

![Error of the gradients against depth](results/drift.png)
"""

PICTURE = "![Error of the gradients against depth](results/drift.png)\n"


def sections(results: Results) -> list[str]:
    head, lines = cost(results.get("memory_depth"), results.get("step_time"))
    parts = [COST_HEAD, markdown((head, lines))] if lines else []
    result = results.get("drift")
    if not result:
        return parts
    parts.append(
        DRIFT_HEAD.format(shape=size(result["settings"]["shape"]), seeds=result["settings"]["seeds"])
    )
    parts += [markdown(table(result, dtype)) for dtype in _dtypes(result)]
    return [*parts, source(result)]


def in_short(results: Results) -> list[str]:
    """Some depths, the first error alone."""
    result = results.get("drift")
    if not result:
        return []
    rows = [row for row in result["rows"] if "error" in row]
    columns = [
        (dtype, depth)
        for dtype in _dtypes(result)
        for depth in IN_SHORT
        if any(r["depth"] == depth for r in rows)
    ]
    by_case = {(row["way"], row["dtype"], row["depth"]): row["error"] for row in rows}
    lines = []
    for way in unique(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        equal = sum(row["equal"] for row in own) / sum(row["tensors"] for row in own)
        cells = [f"{by_case[(way, *c)]:.1e}" if (way, *c) in by_case else NOT_RUN for c in columns]
        lines.append([way, *cells, f"{equal:.1%}"])
    head = ["", *(f"{dtype}, depth {depth}" for dtype, depth in columns), "tensors bitwise plain's"]
    said = "Error of the gradients against float64 at the same streams, on the same blocks:\n"
    return [said, markdown((head, lines)), PICTURE]


def draw(result: Result, path: Path) -> None:
    """The errors against depth, a panel for each precision."""
    dtypes = _dtypes(result)
    figure, axes = picture.panels(len(dtypes))
    for dtype, panel in zip(dtypes, axes, strict=True):
        curves: dict[str, dict[int, float]] = {}
        for row in result["rows"]:
            if row["dtype"] == dtype and "error" in row:
                curves.setdefault(row["way"], {})[row["depth"]] = row["error"]
        curves.pop("revseg Stack", None)  # where "revseg" is
        picture.against_depth(panel, curves, "error of the parameter gradients")
        panel.set_title(dtype)
    picture.save(figure, path)


def cost(memory: Result | None, times: Result | None) -> Table:
    """Peak and time of the exact ways by those of the default engine; no rows if they were not measured."""
    peaks = {(r["way"], r["depth"]): r["peak_mib"] for r in memory_depth.by_depth(memory)} if memory else {}
    ratios = {
        (r["way"], (r["depth"], r["threads"], r["heap"])): r["ratio"]["median"]
        for r in (step_time.timed(times) if times else [])
        if "ratio" in r
    }
    head, columns = [""], []
    for name, values in (("peak", peaks), ("time", ratios)):
        for case in [case for way, case in values if way == DEFAULT and values[way, case]]:
            depth = case if name == "peak" else f"{case[0]}, {thread_count(case[1])}, heap {case[2]}"
            head.append(f"{name}, depth {depth}")
            columns.append([(values.get((way, case)), values[DEFAULT, case]) for way in EXACT])
    rows = [
        [way, *(f"{ours / default:.2f}" if ours else NOT_RUN for ours, default in (c[i] for c in columns))]
        for i, way in enumerate(EXACT)
    ]
    measured = [row for row in rows if set(row[1:]) - {NOT_RUN}]
    return head, measured


def table(result: Result, dtype: str) -> Table:
    """Ways down, depths across."""
    rows = [row for row in result["rows"] if row["dtype"] == dtype and "error" in row]
    depths = unique(row["depth"] for row in rows)
    lines = []
    for way in unique(row["way"] for row in rows):
        own = {row["depth"]: row for row in rows if row["way"] == way}
        equal, tensors = (sum(row[key] for row in own.values()) for key in ("equal", "tensors"))
        lines.append([way, *(_errors(own.get(depth)) for depth in depths), f"{equal:,} of {tensors:,}"])
    return [dtype, *(f"depth {depth}" for depth in depths), "bitwise"], lines


def _dtypes(result: Result) -> Sequence[str]:
    return unique(row["dtype"] for row in result["rows"])


def _errors(row: dict[str, Any] | None) -> str:
    return NOT_RUN if row is None else f"{row['error']:.1e} ({row['ordinary_error']:.1e})"
