"""Who can be trained on which card? The paper's table 3, for every network and memory level.

Peaks of a training step at 1024 x 2048, 19 classes, float32, without auxiliary heads: images and labels counted,
parameters and their gradients not. "plain" is the network of PyTorch's own modules with `F.interpolate` and
`F.cross_entropy`. Predicted on fake tensors for batches of 1, 2 and 4; measured by the allocator's events at batch 1, each
case in a process of its own. "validation" is a step of validation after one of training, while what a training
loop holds is alive. A line through the predictions, MiB = fixed + per image * batch, gives the largest batch of a card:

    budget = its bytes - 500 MiB for the driver and libraries - parameters, gradients and Adam's two moments

    python -m benchmarks measure training_memory --measure 400

`--measure` takes the most 10^9 operations a network may need for an image to be measured here; 0 measures none. The
file is written after every network; with `--names`, rows of the others stay as they are.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks import process, record
from benchmarks.record import Result, Results, Row
from benchmarks.segmentation import (
    CLASSES,
    MIB,
    NETWORKS,
    PAPER,
    batch,
    counts,
    network,
    plain_argmax,
    plain_loss,
    using_kernels,
)
from benchmarks.tables import Table, markdown, source
from revseg.losses import UpsampleCrossEntropy, predict_labels
from revseg.memory import peak_bytes, predicted_peak_bytes
from revseg.metrics import ConfusionMatrix

QUESTION = "Which network can be trained on which card?"
ORDER, SHORT_ORDER = 10, 5
LEVELS = ("plain", "fastest", "balanced", "lowest")
CASES = {"plain": ("fastest", False), **{level: (level, True) for level in LEVELS[1:]}}
BATCHES = (1, 2, 4)
CARDS_GB = (12, 24, 80)
OVERHEAD_MIB = 500
# Of the paper's table 3, MB on its card of 12 GB at batch 4: training, and training with validation.
PAPER_MB: dict[str, tuple[int | str, int | str]] = {
    "pspnet": ("out of memory at batch 1", "out of memory"),
    "enet": (8151, "out of memory"),
    "espnet": (7431, "out of memory"),
    "vnet": (5021, 9345),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", nargs="+", default=NETWORKS, choices=NETWORKS, metavar="NAME")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("H", "W"))
    parser.add_argument("--measure", type=float, default=400, metavar="GFLOPS")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"size": list(args.size), "measure": args.measure, "overhead_mib": OVERHEAD_MIB}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    path = args.out / "training_memory.jsonl"
    rows = record.kept_rows(path, "network", args.names, settings(args))
    for name in args.names:
        rows[name] = row_of(name, tuple(args.size), args.measure) | record.stamp()
        yield [rows[each] for each in NETWORKS if each in rows]


def step(
    name: str, case: str, size: tuple[int, int, int], values: bool, validate: bool
) -> Callable[[], None]:
    """A training step of a network, and if asked a step of validation after it.

    Args:
        name: Of the network.
        case: A name in `CASES`.
        size: N, H, W of the images.
        values: Whether images hold random numbers; without, the step can run on fake tensors.
        validate: Whether a batch of validation follows.
    """
    level, kernels = CASES[case]
    model = network(name, memory=level)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    loss = UpsampleCrossEntropy() if kernels else plain_loss
    matrix = ConfusionMatrix(CLASSES)

    def train_and_validate() -> None:
        images, labels = batch(size, values)
        with using_kernels(kernels):
            value = loss(model(images), labels)
            value.backward()
            if validate:
                model.eval()
                with torch.no_grad():
                    logits = model(images)
                    found = predict_labels(logits, size[1:]) if kernels else plain_argmax(logits, labels)
                    del logits
                    if values:
                        matrix.update(found, labels)
                model.train()

    return train_and_validate


def predicted(name: str, case: str, size: tuple[int, int, int], validate: bool = False) -> float:
    """MiB of a step on fake tensors."""
    return round(predicted_peak_bytes(lambda: step(name, case, size, False, validate)) / MIB, 1)


def law(peaks: dict[int, float]) -> dict[str, float]:
    """The line through peaks by batch: fixed and per_image in MiB, and how far a point is off at most."""
    batches = np.array(list(peaks))
    mib = np.array(list(peaks.values()))
    per_image, fixed = np.polyfit(batches, mib, 1)
    off = np.abs(fixed + per_image * batches - mib) / mib
    return {
        "fixed": round(float(fixed), 1),
        "per_image": round(float(per_image), 1),
        "off": round(float(off.max()), 4),
    }


def largest_batch(line: dict[str, float], card_gb: int, parameters: int) -> int:
    """How many images fit on a card of so many GB (10^9 bytes), by the line; 0 if none does."""
    budget = card_gb * 1e9 / MIB - OVERHEAD_MIB - 4 * 4 * parameters / MIB
    return max(0, int((budget - line["fixed"]) // line["per_image"]))


def measured(name: str, case: str, size: tuple[int, int]) -> dict[str, Any]:
    """Peaks of training alone and with validation at batch 1, found in another process; a note if it failed."""
    found, end = process.run(_job, name, case, list(size))
    return {"note": end} if end else found[0]


def _job(name: str, case: str, size: list[int]) -> Iterator[dict[str, float]]:
    found = {}
    for kind, validate in (("training", False), ("validation", True)):
        found[kind] = round(peak_bytes(step(name, case, (1, size[0], size[1]), True, validate)) / MIB, 1)
        gc.collect()
    yield found


def row_of(name: str, size: tuple[int, int], most_gflops: float) -> Row:
    """All cases of one network."""
    count = counts(name)
    found: Row = {"network": name, **count, "paper_mb": PAPER_MB.get(name), "cases": {}}
    for case in CASES:
        peaks = {n: predicted(name, case, (n, *size)) for n in BATCHES}
        line = law(peaks)
        each: dict[str, Any] = {"predicted_mib": peaks, "law": line}
        each["validation_mib"] = predicted(name, case, (BATCHES[-1], *size), validate=True)
        each["largest"] = {str(gb): largest_batch(line, gb, count["parameters"]) for gb in CARDS_GB}
        allowed = count["gflops"] <= most_gflops
        each["measured"] = measured(name, case, size) if allowed else {"note": "not measured: too slow here"}
        if "training" in each["measured"]:
            each["off"] = round(peaks[1] / each["measured"]["training"] - 1, 4)
        found["cases"][case] = each
        print(name, case, each, flush=True)
    return found


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


def sections(results: Results) -> list[str]:
    result = results.get("training_memory")
    if not result:
        return []
    cards = LARGEST_HEAD.format(overhead=result["settings"]["overhead_mib"])
    parts = ["## Who can be trained on which card\n", HEAD, markdown(table(result)), cards]
    return [*parts, markdown(largest(result)), source(result)]


def in_short(results: Results) -> list[str]:
    """The networks of the paper: how many images a card holds, plain and at the lowest level."""
    result = results.get("training_memory")
    if not result:
        return []
    lines = []
    for row in (row for row in result["rows"] if row["network"] in PAPER):
        plain, lowest = row["cases"]["plain"], row["cases"]["lowest"]
        share = plain["law"]["per_image"] / lowest["law"]["per_image"]
        held = [f"{each['largest'][gb]:,}" for gb in ("12", "24") for each in (plain, lowest)]
        lines.append([row["network"], *held, f"1/{share:.1f}"])
    head = [f"{gb} GB, {level}" for gb in (12, 24) for level in ("plain", "lowest")]
    said = (
        "Images of 1024 x 2048 that a training step holds in float32 on a card of 12 or 24 GB, by the predicted "
        "peaks:\n"
    )
    return [said, markdown((["", *head, "an image, lowest of plain"], lines))]


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
