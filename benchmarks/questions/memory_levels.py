"""What does a training step of VNet take at each memory level, measured and predicted?

Memory: batch 4 at 1024 x 2048, 19 classes, by the allocator's events; parameters and their gradients
not counted, images and labels (bytes, 32 MiB) counted. Time: the ratio to the plain step of that dtype next to
it, of one image of that size, in a process that keeps its memory, so that no page is asked for anew in a step. "plain" is the
network of ordinary PyTorch modules with `F.interpolate` and `F.cross_entropy`.

    python -m benchmarks measure memory_levels --rounds 5

Half an hour on a core. With `--rounds 0` only memory is counted, which any load leaves alone.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import process
from benchmarks.record import Result, Results, Row
from benchmarks.segmentation import CLASSES, MIB, batch, plain_loss, using_kernels
from benchmarks.tables import Table, markdown, quartiles, size, source
from benchmarks.timing import environment, in_turns, spread
from revseg.layers.images import normalize_images
from revseg.losses import UpsampleCrossEntropy, predict_labels
from revseg.memory import peak_bytes, predicted_peak_bytes
from revseg.metrics import ConfusionMatrix
from revseg.models import create_model

QUESTION = "What does a training step of VNet take at each memory level, measured and predicted?"
ORDER, SHORT_ORDER = 6, 4
BF16 = "bfloat16"

# Of each row: whether it is plain PyTorch, the dtype of the network, hyperparameters, and the goal in MiB.
CASES: dict[str, tuple[bool, str, dict[str, Any], int | None]] = {
    "plain": (True, "float32", {"memory": "fastest"}, None),
    "fastest": (False, "float32", {"memory": "fastest"}, None),
    "balanced": (False, "float32", {"memory": "balanced"}, 900),
    "lowest": (False, "float32", {"memory": "lowest"}, 487),
    "least": (False, "float32", {"memory": "least"}, 232),
    "balanced, exact": (False, "float32", {"memory": "balanced", "exact": True}, None),
    "lowest, exact": (False, "float32", {"memory": "lowest", "exact": True}, None),
    "lowest, alpha 8, beta 16": (False, "float32", {"memory": "lowest", "alpha": 8, "beta": 16}, None),
    "least, alpha 8, beta 16": (False, "float32", {"memory": "least", "alpha": 8, "beta": 16}, None),
    "plain, bfloat16": (True, BF16, {"memory": "fastest"}, None),
    "balanced, lossless, bfloat16": (False, BF16, {"memory": "balanced", "exact": "lossless"}, 500),
    "lowest, lossless, bfloat16": (False, BF16, {"memory": "lowest", "exact": "lossless"}, 250),
    "least, lossless, bfloat16": (False, BF16, {"memory": "least", "exact": "lossless"}, 116),
}
TIMED = (
    *("fastest", "balanced", "lowest", "least", "balanced, exact"),
    *("lowest, lossless, bfloat16", "least, lossless, bfloat16"),
)

Step = Callable[[], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--size", type=int, nargs=3, default=(4, 1024, 2048), metavar=("N", "H", "W"))
    parser.add_argument("--time-size", type=int, nargs=3, default=(1, 1024, 2048), metavar=("N", "H", "W"))
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 for memory alone")
    parser.add_argument("--threads", type=int, default=2)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"size": list(args.size), "time_size": list(args.time_size), "rounds": args.rounds}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for case in args.cases:
        row = row_of(case, tuple(args.size)) | {"ratio": None}
        if args.rounds and case in TIMED:
            place = environment("keeps pages", args.threads)
            found, end = process.run(
                time_ratio, case, args.time_size, args.rounds, args.threads, environment=place
            )
            row |= {"note": end} if end else {"ratio": found[0]}
        rows.append(row)
        print(rows[-1], flush=True)
        yield rows


def training_step(
    case: str, size: tuple[int, int, int], values: bool = True, device: str | None = None
) -> Step:
    """One training step: makes images and labels, then runs forward and backward.

    Args:
        case: A name in `CASES`.
        size: N, H, W of the images.
        values: Whether the images hold random numbers; without, the step can run on fake tensors.
        device: Where it runs; by default where PyTorch makes tensors.
    """
    plain, dtype, hyperparameters, _ = CASES[case]
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model = create_model("vnet", CLASSES, **hyperparameters)
    finally:
        torch.set_default_dtype(torch.float32)
    if device is not None:
        model.to(device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    loss = plain_loss if plain else UpsampleCrossEntropy()

    def step() -> None:
        images, labels = batch(size, values, device)
        with using_kernels(not plain):
            loss(model(normalize_images(images).to(p.dtype) if plain else images), labels).backward()

    return step


def validation_step(case: str, size: tuple[int, int, int]) -> Step:
    """One step of validation: prediction, counts of pixels, and the loss."""
    _, _, hyperparameters, _ = CASES[case]
    model = create_model("vnet", CLASSES, **hyperparameters).eval()
    matrix, loss = ConfusionMatrix(CLASSES), UpsampleCrossEntropy()

    @torch.no_grad()
    def step() -> None:
        images, labels = batch(size, values=True)
        logits = model(images)
        matrix.update(predict_labels(logits, labels.shape[-2:]), labels)
        loss(logits, labels)

    return step


def row_of(case: str, size: tuple[int, int, int]) -> Row:
    """Peak of a training step, measured and predicted, and of a validation step."""
    predicted = predicted_peak_bytes(lambda: training_step(case, size, values=False)) / MIB
    gc.collect()
    measured = peak_bytes(training_step(case, size)) / MIB
    row: Row = {"case": case, "peak_mib": round(measured, 1), "predicted_mib": round(predicted, 1)}
    row["goal_mib"] = CASES[case][3]
    row["off"] = round(predicted / measured - 1, 4)
    if case == "lowest":
        row["validation_mib"] = round(peak_bytes(validation_step(case, size)) / MIB, 1)
    return row


def time_ratio(case: str, size: list[int], rounds: int, threads: int) -> Iterator[dict[str, float]]:
    """The step of a case as a ratio to the plain step of its dtype, next to it."""
    torch.set_num_threads(threads)
    n, height, width = size
    plain, other = (training_step(each, (n, height, width)) for each in (plain_of(case), case))
    for step in (plain, other):
        step()
    yield spread([b / a for a, b in in_turns(plain, other, rounds)])


def plain_of(case: str) -> str:
    """The plain case of the same dtype."""
    return "plain, bfloat16" if CASES[case][1] == BF16 else "plain"


HEAD = """\
## Memory levels of VNet

Peak MiB of one training step, 19 classes, by the allocator's events: images and labels (bytes) counted,
parameters and their gradients not. "plain" is the same network of PyTorch's own modules with
`F.interpolate` and `F.cross_entropy`. "predicted" is `revseg.memory.predicted_peak_bytes`, which runs the step
on fake tensors. Time is the ratio to the plain step of that dtype next to it, at {time_size}, in a
process that keeps its memory: median, quartiles in brackets.
"""


def sections(results: Results) -> list[str]:
    result = results.get("memory_levels")
    if not result:
        return []
    n, *image = result["settings"]["time_size"]
    head = HEAD.format(time_size=size([n, 3, *image]))
    return [head, markdown(table(result)), validation(result), source(result)]


def in_short(results: Results) -> list[str]:
    result = results.get("memory_levels")
    said = "The same for a whole network, VNet with its loss:\n"
    return [said, markdown(table(result))] if result else []


def table(result: Result) -> Table:
    """Cases down."""
    n, *image = result["settings"]["size"]
    head = [size([n, 3, *image]), "peak MiB", "predicted", "goal", "of plain", "time of a step"]
    peaks = {row["case"]: row["peak_mib"] for row in result["rows"]}
    rows = []
    for row in result["rows"]:
        plain = peaks.get(plain_of(row["case"]))
        rows.append([
            row["case"],
            f"{row['peak_mib']:,.0f}",
            f"{row['predicted_mib']:,.0f}",
            f"{row['goal_mib']}" if row["goal_mib"] else "",
            f"1/{plain / row['peak_mib']:.1f}" if plain and plain > row["peak_mib"] else "",
            quartiles(row["ratio"]) if row["ratio"] else "1" if row["case"] == plain_of(row["case"]) else "",
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
