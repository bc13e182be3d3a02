"""The section of `benchmarks/README.md` on VNet's memory levels, from `results/memory_levels.json`."""

from typing import Any

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

HEAD = """\
## Memory levels of VNet

Peak MiB of one training step, 19 classes, by the allocator's events: images and labels (bytes) counted,
parameters and their gradients not. "plain" is the same network of PyTorch's own modules with
`F.interpolate` and `F.cross_entropy`. "predicted" is `revseg.memory.predicted_peak_bytes`, which runs the step
on fake tensors. Time is the ratio to the plain step next to it, at a smaller size: median, quartiles in brackets.
"""


def table(result: Result) -> Table:
    """Cases down."""
    n, height, width = result["settings"]["size"]
    head = [f"{n} x 3 x {height} x {width}", "peak MiB", "predicted", "goal", "of plain", "time of a step"]
    peaks = {row["case"]: row["peak_mib"] for row in result["rows"]}
    rows = []
    for row in result["rows"]:
        plain = peaks.get("plain, bfloat16" if "bfloat16" in row["case"] else "plain")
        rows.append([
            row["case"],
            f"{row['peak_mib']:,.0f}",
            f"{row['predicted_mib']:,.0f}",
            f"{row['goal_mib']}" if row["goal_mib"] else "",
            f"1/{plain / row['peak_mib']:.1f}" if plain and plain > row["peak_mib"] else "",
            _time(row["ratio"]) if row["ratio"] else "1" if row["case"] == "plain" else "",
        ])  # fmt: skip
    return head, rows


def validation(result: Result) -> str:
    """What validation takes beside training, in one sentence; empty if it was not measured."""
    row = next((row for row in result["rows"] if "validation_mib" in row), None)
    if row is None:
        return ""
    return (
        f"Validation of such a batch (prediction, counts of pixels, loss) peaks at {row['validation_mib']:,.0f} MiB, "
        f"training at the {row['case']} level at {row['peak_mib']:,.0f}.\n"
    )


def _time(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
