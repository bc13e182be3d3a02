"""What does a step by bands take: every network, VNet of any depth, one image of any size?

Predicted on fake tensors, which no load of a machine changes: images and labels (bytes) counted, parameters and their
gradients not, 19 classes, float32. Networks: one image of 1024 x 2048, beside the plain and the lowest level as
`training_memory` has them. Depth: VNet, batch 4 at 1024 x 2048. Images: VNet, one of each size, and which of three cards holds
the step with 500 MiB for its driver and libraries.

    python -m benchmarks measure bands
    python -m benchmarks measure bands --rows segnet "8,192 x 8,192"

The second measures two rows again and keeps the others. The file is written after each row.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import record
from benchmarks.questions import training_memory
from benchmarks.record import Result, Results, Row
from benchmarks.segmentation import CLASSES, MIB, NETWORKS, PAPER, batch, network, plain_loss, using_kernels
from benchmarks.tables import Table, markdown, source
from revseg.losses import UpsampleCrossEntropy
from revseg.memory import predicted_peak_bytes
from revseg.models import create_model

QUESTION = "What does a training step by bands take, of every network, depth and size?"
ORDER, SHORT_ORDER = 7.5, 6.5
SIDES = (2048, 4096, 8192, 16384)
IMAGES = {f"{side:,} x {side:,}": side for side in SIDES}
DEPTHS = {"alpha 1, beta 2": (1, 2), "alpha 8, beta 16": (8, 16)}
LEVELS = ("plain", "lowest", "least")
SIZE = (1024, 2048)


def add_options(parser: argparse.ArgumentParser) -> None:
    every = [*DEPTHS, *IMAGES, *NETWORKS]
    parser.add_argument("--rows", nargs="+", default=every, choices=every, metavar="ROW")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"size": list(SIZE)}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    rows = record.kept_rows(args.out / "bands.jsonl", "row", args.rows, settings(args))
    for name in args.rows:
        rows[name] = {"row": name, **row_of(name)} | record.stamp()
        print(rows[name], flush=True)
        yield [rows[each] for each in (*DEPTHS, *IMAGES, *NETWORKS) if each in rows]


def row_of(name: str) -> Row:
    if name in DEPTHS:
        alpha, beta = DEPTHS[name]
        return {
            "least": peak(
                lambda: create_model("vnet", CLASSES, memory="least", alpha=alpha, beta=beta), (4, *SIZE)
            )
        }
    if name in IMAGES:
        side = IMAGES[name]
        found = {}
        for level in LEVELS:
            memory = "fastest" if level == "plain" else level
            make = lambda memory=memory: create_model("vnet", CLASSES, memory=memory)
            found[level] = peak(make, (1, side, side), plain=level == "plain")
        return found
    return {"least": peak(lambda: network(name, memory="least"), (1, *SIZE))}


def peak(make: Callable[[], torch.nn.Module], size: tuple[int, int, int], plain: bool = False) -> float:
    """MiB of a training step on fake tensors.

    Args:
        make: Makes the network.
        size: N, H, W of the images.
        plain: Whether it is made of PyTorch's own modules, with its own loss.
    """

    def prepare() -> Callable[[], None]:
        model = make()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        loss = plain_loss if plain else UpsampleCrossEntropy()

        def step() -> None:
            images, labels = batch(size, values=False)
            with using_kernels(not plain):
                loss(model(images), labels).backward()

        return step

    return round(predicted_peak_bytes(prepare) / MIB, 1)


HEAD = """\
## By bands

MiB of a training step at `memory="least"`, predicted on fake tensors: images and labels counted, parameters and their
gradients not. One image of 1024 x 2048, float32, 19 classes:
"""

IMAGES_HEAD = """\
VNet and its loss at full size, one image: MiB of a step, and which card holds it, with 500 MiB for its driver and libraries.
"""


def sections(results: Results) -> list[str]:
    result, others = results.get("bands"), results.get("training_memory")
    if not result or not others:
        return []
    parts = [HEAD, markdown(networks(result, others)), depth(result), IMAGES_HEAD]
    return [*parts, markdown(images(result)), source(result)]


def in_short(results: Results) -> list[str]:
    result = results.get("bands")
    if not result:
        return []
    return [
        'One image and its loss at full size, VNet by bands (`memory="least"`), MiB, predicted:\n',
        markdown(images(result)),
    ]


def networks(result: Result, others: Result) -> Table:
    """Networks down, levels across; those of the paper's tables first."""
    known = {row["network"]: row["cases"] for row in others["rows"]}
    found = {row["row"]: row["least"] for row in result["rows"]}
    rows = []
    for name in sorted((n for n in NETWORKS if n in found and n in known), key=lambda n: n not in PAPER):
        plain, lowest = (known[name][level]["predicted_mib"]["1"] for level in ("plain", "lowest"))
        least = found[name]
        each = [f"{peak:,.0f}" for peak in (plain, lowest, least)]
        rows.append([name, *each, f"1/{plain / lowest:.1f}", f"1/{plain / least:.1f}"])
    return ["", *LEVELS, "lowest of plain", "least of plain"], rows


def depth(result: Result) -> str:
    """What blocks cost, in one sentence; empty if it was not measured."""
    found = {row["row"]: row["least"] for row in result["rows"] if row["row"] in DEPTHS}
    if len(found) < len(DEPTHS):
        return ""
    short, long = (found[name] for name in DEPTHS)
    return (
        f"VNet at batch 4 takes {short:,.1f} MiB with 3 V modules (alpha 1, beta 2) and {long:,.1f} with 24 (alpha 8, "
        f"beta 16): {long / short - 1:+.1%}.\n"
    )


def images(result: Result) -> Table:
    """Sizes down."""
    rows = []
    for row in (row for row in result["rows"] if row["row"] in IMAGES):
        held = [
            f"{gb} GB: " + (", ".join(level for level in LEVELS if fits(row[level], gb)) or "none")
            for gb in training_memory.CARDS_GB
        ]
        rows.append([row["row"], *(f"{row[level]:,.0f}" for level in LEVELS), *held])
    return ["", *LEVELS, *("" for _ in training_memory.CARDS_GB)], rows


def fits(mib: float, gb: int) -> bool:
    """Whether a card of so many GB (10^9 bytes) holds a step."""
    return mib + training_memory.OVERHEAD_MIB <= gb * 1e9 / MIB
