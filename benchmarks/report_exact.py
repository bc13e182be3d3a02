"""The sections of `benchmarks/README.md` on exact inversion: its cost, its gradients, its formats."""

from collections.abc import Sequence
from typing import Any

from benchmarks.exact_formats import LARGEST
from benchmarks.report_depth import by_depth, timed

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

IN_SHORT = (16, 32, 100)  # depths

DEFAULT, EXACT = "revseg", ("revseg exact", "revseg lossless")

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

FORMATS_HEAD = """\
## Formats of a stream

Up to which size sums are right and undone bit for bit, what values are rounded to, the time of an update and
of undoing it as multiples of a plain addition, and MiB for streams of {stream:g} MiB: kept for the backward pass
by each sequence and by each update, and copied for each function to read. The last column is the error of the
gradients of a network of {depth} blocks against float64 of the ordinary network.

The grid is `exact=True`: of the three that can be undone it alone keeps nothing, as functions read the stream
itself. Fixed point is 64 times finer, for a copy of every stream that a function reads and two of the output.
Residues are `exact="lossless"`: the network is not rounded at all.
"""


def cost(memory: Result | None, times: Result | None) -> Table:
    """Peak and time of the exact ways by those of the default engine; no rows if they were not measured."""
    peaks = {(r["way"], r["depth"]): r["peak_mib"] for r in by_depth(memory)} if memory else {}
    ratios = {
        (r["way"], (r["depth"], r["threads"], r["heap"])): r["ratio"]["median"]
        for r in (timed(times) if times else [])
        if "ratio" in r
    }
    head, columns = [""], []
    for name, values in (("peak", peaks), ("time", ratios)):
        for case in [case for way, case in values if way == DEFAULT and values[way, case]]:
            depth = (
                case
                if name == "peak"
                else f"{case[0]}, {case[1]} thread{'s' * (case[1] > 1)}, heap {case[2]}"
            )
            head.append(f"{name}, depth {depth}")
            columns.append([(values.get((way, case)), values[DEFAULT, case]) for way in EXACT])
    rows = [
        [way, *(f"{ours / default:.2f}" if ours else "not run" for ours, default in (c[i] for c in columns))]
        for i, way in enumerate(EXACT)
    ]
    measured = [row for row in rows if set(row[1:]) - {"not run"}]
    return head, measured


def drift(result: Result, dtype: str) -> Table:
    """Ways down, depths across."""
    rows = [row for row in result["rows"] if row["dtype"] == dtype and "error" in row]
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    table = []
    for way in dict.fromkeys(row["way"] for row in rows):
        own = {row["depth"]: row for row in rows if row["way"] == way}
        equal, tensors = (sum(row[key] for row in own.values()) for key in ("equal", "tensors"))
        table.append([way, *(_errors(own.get(depth)) for depth in depths), f"{equal:,} of {tensors:,}"])
    return [dtype, *(f"depth {depth}" for depth in depths), "bitwise"], table


def drift_in_short(result: Result) -> Table:
    """The same for the README of the project: some depths, the first error alone."""
    rows = [row for row in result["rows"] if "error" in row]
    columns = [
        (dtype, depth)
        for dtype in dtypes(result)
        for depth in IN_SHORT
        if any(r["depth"] == depth for r in rows)
    ]
    errors = {(row["way"], row["dtype"], row["depth"]): row["error"] for row in rows}
    table = []
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        equal = sum(row["equal"] for row in own) / sum(row["tensors"] for row in own)
        cells = [f"{errors[(way, *c)]:.1e}" if (way, *c) in errors else "not run" for c in columns]
        table.append([way, *cells, f"{equal:.1%}"])
    return ["", *(f"{dtype}, depth {depth}" for dtype, depth in columns), "tensors bitwise plain's"], table


def formats(result: Result) -> Table:
    """A row for each format."""
    head = [
        "",
        "exact up to",
        "step",
        "update",
        "undo",
        "a sequence",
        "an update",
        "copied",
        "gradients off by",
    ]
    return head, [
        [
            row["format"],
            _power(row["exact_to"]),
            "-" if row["step"] is None else f"2^{_exponent(row['step'])}",
            f"{row['update']:.1f}",
            f"{row['undo']:.1f}",
            *(f"{row[key]:.3g}" for key in ("kept_a_sequence_mib", "kept_an_update_mib", "copy_mib")),
            f"{row['gradient_error']:.1e}",
        ]
        for row in result["rows"]
    ]


def dtypes(result: Result) -> Sequence[str]:
    """The precisions that were measured."""
    return list(dict.fromkeys(row["dtype"] for row in result["rows"]))


def _errors(row: dict[str, Any] | None) -> str:
    return "not run" if row is None else f"{row['error']:.1e} ({row['ordinary_error']:.1e})"


def _power(exponent: int | None) -> str:
    return "never" if exponent is None else "any size" if exponent == LARGEST else f"2^{exponent}"


def _exponent(power: float) -> int:
    return round(power).bit_length() - 1 if power >= 1 else 1 - round(1 / power).bit_length()
