"""The section of `benchmarks/README.md` on kernels compiled ahead of time, from `results/compile_ahead.json`."""

from typing import Any

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

HEAD = """\
## Kernels for every GPU

Every launch of every operation, dtype, memory layout and number of channels, forward and backward, compiled for GPUs
that need not be there. Spilled is what registers could not hold, in instructions of a kernel with its operation and
channels; kernels that spill are listed with the reason in [compile_ahead.py](compile_ahead.py).
"""


def table(result: Result) -> Table:
    """GPUs down."""
    head = [
        "",
        "kernels",
        "failed",
        "spilling",
        "most spilled",
        "most registers",
        "most shared memory, bytes",
        "of",
    ]
    limits: dict[str, int] = result["settings"]["shared_memory"]
    return head, [_row(target, limit, result["rows"]) for target, limit in limits.items()]


def _row(target: str, limit: int, rows: list[dict[str, Any]]) -> list[str]:
    rows = [row for row in rows if row["target"] == target]
    made = [row for row in rows if "error" not in row]
    if not made:
        return [target, "0", str(len(rows)), *[""] * 5]
    spilling = [row for row in made if row["spills"]]
    worst = max(made, key=lambda row: row["spills"])
    name = f"{worst['spills']} ({worst['operation']}, {worst['numbers']}, {worst['channels']} channels)"
    return [
        target,
        str(len(made)),
        str(len(rows) - len(made)),
        str(len(spilling)),
        name if spilling else "0",
        str(max(row["registers"] for row in made)),
        f"{max(row['shared'] for row in made):,}",
        f"{limit:,}",
    ]
