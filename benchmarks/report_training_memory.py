"""Table 3 remade, from `results/training_memory.json`."""

from typing import Any

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

LEVELS = ("plain", "fastest", "balanced", "lowest")

HEAD = """\
MiB of a training step at 1024 x 2048, 19 classes, float32, batch 4: predicted on fake tensors; parameters and gradients
come on top, images and labels are in. A step of validation that follows one of training peaks below it
unless "validation" says otherwise. "off" is how far the prediction is from a measurement at batch 1, at
most, over the levels that were measured here: on contiguous maps convolutions of a CPU copy their maps into other
layouts, an image at a time, which a prediction does not count.
"""

LARGEST_HEAD = """\
The largest batch by the line through the predictions, on a card of so many GB, with {overhead} MiB for driver and
libraries, parameters, gradients and Adam's moments taken off: plain, then at the lowest level.
"""


def table(result: Result) -> Table:
    """Networks down, memory levels across."""
    rows = []
    for row in result["rows"]:
        cases = row["cases"]
        peaks = [cases[case]["predicted_mib"]["4"] for case in LEVELS]
        over = [
            case
            for case in LEVELS
            if cases[case]["validation_mib"] > cases[case]["predicted_mib"]["4"] * 1.001
        ]
        offs = [abs(cases[case]["off"]) for case in LEVELS if "off" in cases[case]]
        paper = row["paper_mb"]
        rows.append([
            row["network"],
            *(f"{peak:,.0f}" for peak in peaks),
            ", ".join(f"{case} {cases[case]['validation_mib']:,.0f}" for case in over),
            f"{max(offs):.1%}" if offs else "not measured",
            f"{paper[0]}, {paper[1]}" if paper else "",
        ])  # fmt: skip
    return ["", *LEVELS, "validation", "off", "the paper's MB, with validation"], rows


def largest(result: Result) -> Table:
    """Networks down, cards across."""
    cards = list(result["rows"][0]["cases"]["plain"]["largest"])
    rows = [
        [
            row["network"],
            *(
                f"{row['cases']['plain']['largest'][gb]:,} / {row['cases']['lowest']['largest'][gb]:,}"
                for gb in cards
            ),
            f"{row['cases']['lowest']['law']['per_image']:,.1f}",
        ]
        for row in result["rows"]
    ]
    return ["", *(f"{gb} GB" for gb in cards), "MiB an image, lowest"], rows


def in_short(result: Result) -> Table:
    """The networks of the paper: how many images a card holds, plain and at the lowest level."""
    rows = []
    for row in (row for row in result["rows"] if row["network"] in PAPERS):
        plain, lowest = row["cases"]["plain"], row["cases"]["lowest"]
        share = plain["law"]["per_image"] / lowest["law"]["per_image"]
        held = [f"{each['largest'][gb]:,}" for gb in ("12", "24") for each in (plain, lowest)]
        rows.append([row["network"], *held, f"1/{share:.1f}"])
    head = [f"{gb} GB, {level}" for gb in (12, 24) for level in ("plain", "lowest")]
    return ["", *head, "an image, lowest of plain"], rows


PAPERS = (
    "pspnet",
    "bisenet_resnet18",
    "segnet",
    "icnet",
    "bisenet_xception39",
    "erfnet",
    "enet",
    "espnet",
    "vnet",
)
