"""The section of `benchmarks/README.md` on upsampling and cross-entropy."""

from typing import Any

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

HEAD = """\
## Upsampling and cross-entropy

`revseg.ops.upsample_cross_entropy` and `upsample_argmax` against `F.interpolate` with `F.cross_entropy` and
`argmax`. Peak MiB of the loss, its backward pass included where the logits are trained, beyond what
was live before it: logits, their gradient, labels. In brackets, the MiB saved for the backward pass.
"""

TIME_HEAD = """\
Ratio of the time to that of PyTorch, which ran next to it: median, quartiles in brackets.
"""


def memory_table(result: Result) -> Table:
    """Tasks down, way and type across; the shape is that of the first row."""
    rows = [row for row in result["rows"] if "peak_mib" in row]
    columns = list(dict.fromkeys((row["dtype"], row["way"]) for row in rows))
    cells = {(row["task"], row["dtype"], row["way"]): row for row in rows}
    head = [_sizes(rows[0]["shape"], result["settings"]["factor"]), *(" ".join(c) for c in columns)]
    tasks = dict.fromkeys(row["task"] for row in rows)
    return head, [[task, *(_memory_cell(cells[(task, *c)]) for c in columns)] for task in tasks]


def time_table(result: Result) -> Table | None:
    """Tasks down, threads and heap across; None if only memory was counted."""
    rows = [row for row in result["rows"] if "ratio" in row]
    if not rows:
        return None
    columns = list(dict.fromkeys((row["threads"], row["heap"]) for row in rows))
    cells = {(row["task"], row["threads"], row["heap"]): row for row in rows}
    head = [f"{threads} thread{'s' * (threads > 1)}, heap {heap}" for threads, heap in columns]
    tasks = dict.fromkeys(row["task"] for row in rows)
    table = [[task, *(_time_cell(cells[(task, *c)]) for c in columns)] for task in tasks]
    return [_sizes(rows[0]["shape"], result["settings"]["factor"]), *head], table


def _sizes(shape: list[int], factor: int) -> str:
    n, classes, h, w = shape
    return f"{n} x {classes} x {h} x {w} to {factor * h} x {factor * w}"


def _memory_cell(row: dict[str, Any]) -> str:
    saved = f" ({row['saved_mib']:,.1f})" if row["saved_mib"] else ""
    return f"{row['peak_mib']:,.1f}{saved}"


def _time_cell(row: dict[str, Any]) -> str:
    ratio = row["ratio"]
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) of {row['plain_s']:.2f} s"
