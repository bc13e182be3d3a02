"""The words of a table: rows in Markdown, where they come from, and how a number is written."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from benchmarks.record import Result

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # head and rows
T = TypeVar("T")
NOT_RUN = "not run"


def markdown(table: Table) -> str:
    """The first column to the left, the others to the right."""
    head, rows = table
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def source(result: Result) -> str:
    """Where a table comes from, in one paragraph."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v)
    gpu = f", {machine['gpu']}" if machine["gpu"] else ", no GPU"
    return (
        f"`{result['command']}` at commit {result['commit'] or 'unknown'}, {result['date'][:10]}; {versions}; "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB{gpu}, load {machine['load']}.\n"
    )


def quartiles(spread: dict[str, float] | None) -> str:
    """As in "1.30 (1.28 to 1.31)"; of None, that it was not run."""
    if spread is None:
        return NOT_RUN
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def mean_and_range(values: Sequence[float]) -> str:
    """As in "41.2 (40.8 to 41.9)"; of one value, that alone."""
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def size(shape: Sequence[int]) -> str:
    """As in "2 x 64 x 128 x 256"."""
    return " x ".join(map(str, shape))


def thread_count(threads: int) -> str:
    """As in "2 threads"."""
    return f"{threads} thread{'s' * (threads > 1)}"


def unique(values: Iterable[T]) -> list[T]:
    """Each once, in the order in which they come."""
    return list(dict.fromkeys(values))
