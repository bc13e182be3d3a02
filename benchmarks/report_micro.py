"""The section of `benchmarks/README.md` on the parts of a step, from `results/micro.json`."""

from typing import Any

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

HEAD = """\
## The parts of a step

Milliseconds, median and in brackets the distance of the quartiles, by pytest-benchmark
([cases](micro/cases.py)): ours, and its twin of PyTorch's functions after it in the same run. The exact sums and the
packing of residues do more than their twins, which lose what rounding takes; `sequence_step` is a tiny tensor, all
overhead.
"""


def table(result: Result) -> Table:
    """Cases down."""
    rows = [
        [
            row["case"],
            _cell(row["ours"]),
            _cell(row["plain"]),
            f"{row['ours']['median_ms'] / row['plain']['median_ms']:.2f}",
            str(row["ours"]["rounds"]),
        ]
        for row in result["rows"]
    ]
    return ["", "ours, ms", "plain, ms", "ratio", "rounds"], rows


def _cell(times: dict[str, Any]) -> str:
    return f"{times['median_ms']:.3g} ({times['iqr_ms']:.2g})"
