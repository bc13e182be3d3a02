"""What does the memory that is saved buy, on a card of fixed size?

The card holds a plain step of VNet on 4 small images, to the byte as predicted, and no more. On it are trained: that step; at the
lowest memory level batches of 4, of 16 and of as many as the card holds; and batches of 4, and of as many as it holds, of images
twice as high and wide.
Every network sees as many images, with a learning rate that grows as the root of the batch, and is evaluated on the large
images at full size: one that learned from small images is given small ones, and its scores are made larger.

Generated scenes with thin and small things (`revseg.data.synthetic`).

    python -m benchmarks measure fixed_card --seeds 0 1 2

Half an hour on a core for three seeds. Rows that are there already are not measured again; mIoU depends on no load.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import picture, record
from benchmarks.network_ways import Training, level, plain
from benchmarks.questions.full_resolution import RATE, evaluated, smaller
from benchmarks.questions.whole_networks import step_of
from benchmarks.record import Result, Results, Row
from benchmarks.segmentation import CLASSES, MIB
from benchmarks.tables import Table, markdown, mean_and_range, source, unique
from revseg.commands.plan import largest
from revseg.data import SyntheticStreets
from revseg.memory import predicted_peak_bytes

QUESTION = "What does the memory that is saved buy, on a card of fixed size?"
ORDER = 13.7
ASKED_ALONE = True  # it takes half an hour
SIZE = (256, 512)  # of the large images
BATCH = 4
CHECKS = 5  # how often a network is evaluated
DIALS = {"thin": 1.0, "small": 1.0}


@dataclass(frozen=True)
class Case:
    """One use of the card.

    Args:
        batch: Images of a step; 0 for as many as the card holds.
        plain: Activations are stored.
        factor: By which height and width are divided.
    """

    batch: int
    plain: bool = False
    factor: int = 2


CASES = {
    "plain, batch 4": Case(BATCH, plain=True),
    "lowest, batch 4": Case(BATCH),
    "lowest, batch 16": Case(16),
    "lowest, as many as fit": Case(0),
    "lowest, batch 4, twice the size": Case(BATCH, factor=1),
    "lowest, as many as fit, twice the size": Case(0, factor=1),
}
Samples = list[tuple[Tensor, Tensor]]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--images", type=int, default=3600, help="that each network sees")
    parser.add_argument("--size", type=int, nargs=2, default=SIZE, metavar=("H", "W"))
    parser.add_argument("--samples", type=int, nargs=2, default=(240, 60), metavar=("TRAIN", "VAL"))
    parser.add_argument("--threads", type=int, default=1)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"images": args.images, "size": list(args.size), "samples": list(args.samples)}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    torch.set_num_threads(args.threads)
    rows = record.earlier_rows(args.out / "fixed_card.jsonl", settings(args), lambda row: True)
    done = {(row["case"], row["seed"]) for row in rows}
    size = (args.size[0], args.size[1])
    card = step_bytes(CASES["plain, batch 4"], BATCH, size)
    for seed in args.seeds:
        data: dict[str, Samples] = {}
        for name in args.cases:
            if (name, seed) in done:
                continue
            case = CASES[name]
            batch = case.batch or most_images(case, size, card)
            peak = step_bytes(case, batch, size)
            row: Row = {"case": name, "seed": seed, "batch": batch, "peak_mib": round(peak / MIB, 1)}
            row["card_mib"] = round(card / MIB, 1)
            if peak > card:
                rows.append(row | {"note": "more than the card holds"} | record.stamp())
                continue
            data = data or {split: scenes(split, seed, size, args.samples) for split in ("train", "val")}
            rows.append(row | trained(data, case, batch, seed, args.images) | record.stamp())
            print(rows[-1], flush=True)
            yield rows
    yield rows


def made(case: Case) -> Training:
    """PyTorch's own modules and loss, or ours at the lowest memory level."""
    return plain("vnet") if case.plain else level("vnet", "lowest")


def step_bytes(case: Case, batch: int, size: tuple[int, int]) -> int:
    """Predicted bytes of a training step, images and labels counted."""
    height, width = (side // case.factor for side in size)
    return predicted_peak_bytes(lambda: step_of(made(case), (batch, height, width)))


def most_images(case: Case, size: tuple[int, int], card: int) -> int:
    """The largest batch that the card holds."""
    return largest(lambda batch: step_bytes(case, batch, size), card, BATCH, 1)


def scenes(split: str, seed: int, size: tuple[int, int], samples: tuple[int, int]) -> Samples:
    data = SyntheticStreets(split, size=size, seed=seed, samples=samples[split == "val"], **DIALS)
    return [data.load(i) for i in range(len(data))]


def trained(data: dict[str, Samples], case: Case, batch: int, seed: int, images_seen: int) -> Row:
    """The mIoU on the large images over a training."""
    torch.manual_seed(seed)
    dice = torch.Generator().manual_seed(seed)
    training = made(case)
    model = training.model
    rate = RATE * (batch / BATCH) ** 0.5
    optimizer = torch.optim.Adam(model.parameters(), rate)
    count, seconds, curve = max(1, round(images_seen / batch)), 0.0, []
    checks = {round(count * (i + 1) / CHECKS) for i in range(CHECKS)}
    for step in range(count):
        started = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / max(1, count // 15)) * (1 - step / count) ** 0.9
        chosen = torch.randint(0, len(data["train"]), (batch,), generator=dice).tolist()
        images, labels = (torch.stack(each) for each in zip(*(data["train"][i] for i in chosen), strict=True))
        if torch.rand((), generator=dice) < 0.5:
            images, labels = images.flip(-1), labels.flip(-1)
        if case.factor > 1:
            images, labels = smaller(images, case.factor), labels[:, :: case.factor, :: case.factor]
        optimizer.zero_grad()
        model.train()
        training.step(images, labels)
        optimizer.step()
        seconds += time.process_time() - started
        if step + 1 in checks:
            way = "full" if case.factor == 1 else f"resize {case.factor}"
            score = evaluated(model.eval(), data["val"], way, CLASSES, "thin")["miou"]
            curve.append([batch * (step + 1), round(seconds, 1), score])
    return {"steps": count, "curve": curve, "miou": curve[-1][2]}


HEAD = """\
## What the saved memory buys on one card

The card holds a plain step of VNet on {batch} images of {small}: {card:,.0f} MiB, predicted, as every peak here. Generated scenes
with thin and small things, {train} for training, other cities for evaluation, always at {large}; each network sees {images:,} images,
Adam, a learning rate that grows as the root of the batch. mIoU in percent, mean of {seeds} seed{s} and the range; seconds are of
the training steps on one thread's own clock.

![mIoU over the images seen](results/fixed_card.png)
"""


def sections(results: Results) -> list[str]:
    result = results.get("fixed_card")
    if not result:
        return []
    told, seeds = result["settings"], len({row["seed"] for row in result["rows"]})
    height, width = told["size"]
    head = HEAD.format(
        batch=BATCH, small=f"{height // 2} x {width // 2}", large=f"{height} x {width}", images=told["images"],
        card=result["rows"][0]["card_mib"], train=told["samples"][0], seeds=seeds, s="s" * (seeds > 1),
    )  # fmt: skip
    return [head, markdown(table(result)), source(result)]


def table(result: Result) -> Table:
    head = ["", "batch", "peak MiB", "steps", "mIoU", "seconds"]
    lines = []
    for case in unique(row["case"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["case"] == case]
        first = rows[0]
        cells = [case, str(first["batch"]), f"{first['peak_mib']:,.0f}"]
        if "note" in first:
            lines.append([*cells, "", first["note"], ""])
            continue
        scores, seconds = [100 * row["miou"] for row in rows], [row["curve"][-1][1] for row in rows]
        lines.append(
            [*cells, str(first["steps"]), mean_and_range(scores), f"{sum(seconds) / len(seconds):,.0f}"]
        )
    return head, lines


def draw(result: Result, path: Path) -> None:
    """A line for each use of the card, mean of the seeds."""
    figure, (axes,) = picture.panels(1, 6.4, 4.2)
    for case in unique(row["case"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["case"] == case and "curve" in row]
        if rows:
            points: Callable[[int], list[float]] = lambda i, rows=rows: [
                sum(row["curve"][k][i] for row in rows) / len(rows) for k in range(len(rows[0]["curve"]))
            ]
            axes.plot(points(0), [100 * score for score in points(2)], ".-", label=case)
    axes.set(xlabel="images seen", ylabel="mIoU on the large images, %")
    if axes.lines:
        axes.legend(fontsize=8)
    picture.save(figure, path)
