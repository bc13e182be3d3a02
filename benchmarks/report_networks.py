"""The section of `benchmarks/README.md` on all networks, from `results/networks.json`."""

from typing import Any

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

MEGABYTES = ("bisenet_resnet18", "bisenet_xception39")

HEAD = """\
19 classes, no auxiliary heads; 10^9 operations of one image of 1024 x 2048, two a multiply-add. Peaks are MiB of one
training step at that size in float32, predicted on fake tensors; "plain" is PyTorch's own modules and loss. Time is
a forward pass in evaluation, one image of 512 x 1024 on a CPU, as a multiple of VNet's next to it.
"""

FOOT = """\
[1] The paper prints 49 and 5.8: these are megabytes of a file, not parameters. [2] The paper prints 7.8 for ICNet, which
is its file of 31 MB divided by four bytes; the deployed network has 6.7. The `_rev` networks are changes of
architecture.
"""


def table(result: Result) -> Table:
    """Networks down."""
    head = [
        "",
        "parameters, M",
        "the paper's",
        "GFLOPs",
        "batch",
        "plain",
        "fastest",
        "balanced",
        "lowest",
        "time",
    ]
    rows = []
    for row in result["rows"]:
        peaks, mark = row["peaks_mib"], ""
        if row["network"] in MEGABYTES:
            mark = " [1]"
        elif row["network"] == "icnet":
            mark = " [2]"
        rows.append([
            row["network"],
            f"{row['parameters'] / 1e6:.3f}",
            f"{row['paper_millions']}{mark}" if row["paper_millions"] else "",
            f"{row['gflops']:,.1f}",
            str(row["batch"]),
            *(f"{peaks[case]:,.0f}" for case in ("plain", "fastest", "balanced", "lowest")),
            f"{row['time']['ratio']['median']:.2f}" if row["time"] else "",
        ])  # fmt: skip
    return head, rows


def ranking(result: Result) -> str:
    """Who is faster than whom, by the paper and here, in two sentences; empty if nothing was timed."""
    rows = [row for row in result["rows"] if row["paper_fps"] and row["time"]]
    if not rows:
        return ""
    by_paper = sorted(rows, key=lambda row: -row["paper_fps"])
    here = sorted(rows, key=lambda row: row["time"]["ratio"]["median"])
    names = [", ".join(row["network"] for row in order) for order in (by_paper, here)]
    same = "the same" if names[0] == names[1] else "another"
    return (
        f"From the fastest on, by the paper's frames per second on its card: {names[0]}. Here, on a CPU at half the "
        f"size, the order is {same}: {names[1]}.\n"
    )
