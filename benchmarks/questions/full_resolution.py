"""Does a network that trains at full resolution beat one that trains on crops or on smaller images?

The claim of the VNet paper. VNet trains on whole images, on random crops of half their height and width, and on images
made smaller by 2 and by 4; at as many steps as whole images get, and at as many pixels (4 and 16 times the steps).
All are evaluated on whole images with labels at full size: the network that learned from smaller images is given smaller ones, and
its scores are made larger.

Generated scenes (`revseg.data.synthetic`) say what decides, by their dials: things a few pixels wide ("thin"), far
things that small cues tell apart ("small"), grounds that something far away explains ("context"); "none" is the control, in which
everything is large. With `--root` CamVid is asked too.

    python -m benchmarks measure full_resolution --seeds 0 1 2
    python -m benchmarks measure full_resolution --scenes thin none --ways full crop --steps 100
    python -m benchmarks measure full_resolution --scenes camvid --root CamVid

About three hours on one core for three seeds. Rows that are there already are not measured again, so that it goes on
where it was cut off; mIoU depends on no load.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import picture, record
from benchmarks.record import Result, Results, Row
from benchmarks.tables import Table, markdown, mean_and_range, source, unique
from revseg.data import CITYSCAPES, CamVid, SegmentationDataset, SyntheticStreets
from revseg.files import finite_or_none
from revseg.losses import UpsampleCrossEntropy, predict_labels
from revseg.metrics import ConfusionMatrix
from revseg.models import create_model

QUESTION = "Does full resolution beat crops and smaller images?"
ORDER = 13.5
ASKED_ALONE = True  # it takes hours
DIALS: dict[str, dict[str, float]] = {
    "thin": {"thin": 1.0},
    "small": {"small": 1.0},
    "context": {"context": 1.0},
    "none": {"thin": 0.0},
}
ASKED: dict[str, tuple[str, ...]] = {  # the classes that a dial is about
    "thin": ("pole", "fence"),
    "small": ("traffic light", "traffic sign"),
    "context": ("sidewalk", "terrain"),
}
WAYS = ("full", "crop", "resize 2", "resize 4")
BUDGETS = ("steps", "pixels")
SIZE, BATCH, RATE = (256, 512), 4, 2e-3


def add_options(parser: argparse.ArgumentParser) -> None:
    scenes = [*DIALS, "camvid"]
    parser.add_argument("--scenes", nargs="+", default=list(DIALS), choices=scenes, metavar="SCENES")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--steps", type=int, default=300, help="of the network that sees whole images")
    parser.add_argument(
        "--size", type=int, nargs=2, default=SIZE, metavar=("H", "W"), help="of generated scenes"
    )
    parser.add_argument("--samples", type=int, nargs=2, default=(240, 60), metavar=("TRAIN", "VAL"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--root", type=Path, help="the folder of CamVid")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"steps": args.steps, "size": list(args.size), "samples": list(args.samples)}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    if "camvid" in args.scenes and args.root is None:
        raise SystemExit("expected --root, the folder of CamVid, got none")
    torch.set_num_threads(args.threads)
    rows = record.earlier_rows(args.out / "full_resolution.jsonl", settings(args), lambda row: True)
    done = {key_of(row) for row in rows}
    for seed in args.seeds:
        for scenes in args.scenes:
            data: dict[str, list[tuple[Tensor, Tensor]]] = {}
            for way in args.ways:
                for budget in BUDGETS[: 1 if way == "full" else None]:
                    row: Row = {"scenes": scenes, "way": way, "budget": budget, "seed": seed}
                    if key_of(row) in done:
                        continue
                    data = data or {split: loaded(scenes, split, seed, args) for split in ("train", "val")}
                    rows.append(row | trained(data, scenes, way, budget, seed, args.steps) | record.stamp())
                    print({k: v for k, v in rows[-1].items() if k != "iou"}, flush=True)
                    yield rows
    yield rows


def key_of(row: Row) -> tuple[Any, ...]:
    return row["scenes"], row["way"], row["budget"], row["seed"]


def dataset(scenes: str, split: str, seed: int, args: argparse.Namespace) -> SegmentationDataset:
    if scenes == "camvid":
        return CamVid(args.root, split)
    samples = args.samples[split == "val"]
    return SyntheticStreets(split, size=tuple(args.size), seed=seed, samples=samples, **DIALS[scenes])


def loaded(scenes: str, split: str, seed: int, args: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Images [3, H, W] and labels [H, W], uint8, all of a split."""
    data = dataset(scenes, split, seed, args)
    return [data.load(i) for i in range(len(data))]


def factor_of(way: str) -> int:
    """By which images are made smaller."""
    return int(way.split()[1]) if way.startswith("resize") else 1


def smaller(images: Tensor, factor: int) -> Tensor:
    """Images [N, 3, H, W], uint8, each side a `factor`-th."""
    size = [side // factor for side in images.shape[-2:]]
    scaled = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
    return scaled.round().clamp(0, 255).byte()


def shown(images: Tensor, labels: Tensor, way: str, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """What a step sees of a batch: all of it, a crop of half its height and width, or all of it smaller."""
    if way.startswith("resize"):
        factor = factor_of(way)
        return smaller(images, factor), labels[:, ::factor, ::factor]
    if way == "full":
        return images, labels
    height, width = (side // 2 for side in labels.shape[-2:])
    top, left = (int(torch.randint(0, side + 1, (), generator=dice)) for side in (height, width))
    window = (..., slice(top, top + height), slice(left, left + width))
    return images[window], labels[window]


def steps_of(way: str, budget: str, steps: int) -> int:
    """At equal steps as many as whole images get; at equal pixels 4 or 16 times as many."""
    if way == "full" or budget == "steps":
        return steps
    return steps * (4 if way == "crop" else factor_of(way) ** 2)


def trained(
    data: dict[str, list[tuple[Tensor, Tensor]]], scenes: str, way: str, budget: str, seed: int, steps: int
) -> Row:
    """Trains a network and evaluates it on whole images."""
    torch.manual_seed(seed)
    dice = torch.Generator().manual_seed(seed)
    classes = 11 if scenes == "camvid" else 19
    model, loss = create_model("vnet", classes, memory="fastest"), UpsampleCrossEntropy()
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    count, start = steps_of(way, budget, steps), time.time()
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - step / count) ** 0.9
        chosen = torch.randint(0, len(data["train"]), (BATCH,), generator=dice).tolist()
        images, labels = (torch.stack(each) for each in zip(*(data["train"][i] for i in chosen), strict=True))
        if torch.rand((), generator=dice) < 0.5:
            images, labels = images.flip(-1), labels.flip(-1)
        images, labels = shown(images, labels, way, dice)
        optimizer.zero_grad()
        loss(model(images), labels).backward()
        optimizer.step()
    return {
        "steps": count,
        "seconds": round(time.time() - start, 1),
        **evaluated(model.eval(), data["val"], way, classes, scenes),
    }


@torch.no_grad()
def evaluated(model: Any, data: list[tuple[Tensor, Tensor]], way: str, classes: int, scenes: str) -> Row:
    """The mIoU of all classes that occur, of those that the dial is about, and each."""
    matrix = ConfusionMatrix(classes)
    for image, label in data:
        given = image[None] if factor_of(way) == 1 else smaller(image[None], factor_of(way))
        matrix.update(predict_labels(model(given), label.shape), label[None])
    found = [finite_or_none(value) for value in matrix.iou().tolist()]
    present = [value for value in found if value is not None]
    asked = [found[CITYSCAPES.names.index(name)] or 0.0 for name in ASKED.get(scenes, ())]
    return {
        "miou": round(sum(present) / len(present), 4),
        "asked_miou": round(sum(asked) / len(asked), 4) if asked else None,
        "iou": [None if value is None else round(value, 4) for value in found],
    }


HEAD = """\
## Full resolution against crops and smaller images

VNet on generated scenes of {size}, {train} for training, and on other cities for evaluation, always at full size; batch {batch},
Adam {rate:g}, {steps} steps on whole images. "steps": as many for the others; "pixels": 4 or 16 times as many, so that each
network sees as many pixels. mIoU in percent, mean of {seeds} seed{s} and the range; in brackets the classes that the dial is
about: poles and fences ("thin"), signs and lights ("small"), sidewalk and terrain ("context"). "none" is the control;
"camvid" are photographs, CamVid's 367 and 101 of 360 x 480, at the same batch and steps.
"""


def sections(results: Results) -> list[str]:
    result = results.get("full_resolution")
    if not result:
        return []
    settings, seeds = result["settings"], len({row["seed"] for row in result["rows"]})
    height, width = settings["size"]
    head = HEAD.format(
        size=f"{height} x {width}", train=settings["samples"][0], batch=BATCH, rate=RATE,
        steps=settings["steps"], seeds=seeds, s="s" * (seeds > 1),
    )  # fmt: skip
    shown = ["![mIoU by way and dial](results/full_resolution.png)\n"]
    return [head, *shown, markdown(table(result)), answer(result), source(result)]


def answer(result: Result) -> str:
    """Each way beside whole images, over all scenes and seeds."""
    scores = {key_of(row): 100 * row["miou"] for row in result["rows"]}
    gaps: dict[tuple[str, str], list[float]] = {}
    for (scenes, way, budget, seed), score in scores.items():
        whole = scores.get((scenes, "full", "steps", seed))
        if way != "full" and whole is not None:
            gaps.setdefault((way, budget), []).append(score - whole)
    lines = [
        f"- {way}, equal {budget}: {sum(found) / len(found):+.1f} ({min(found):+.1f} to {max(found):+.1f})"
        for (way, budget), found in gaps.items()
    ]
    return "\n".join(["Points of mIoU beside whole images, over all scenes and seeds:\n", *lines, ""])


def table(result: Result) -> Table:
    scenes = unique(row["scenes"] for row in result["rows"])
    lines = []
    for way, budget in unique((row["way"], row["budget"]) for row in result["rows"]):
        cells = [cell(result, each, way, budget) for each in scenes]
        lines.append([way if way == "full" else f"{way}, equal {budget}", *cells])
    return ["", *scenes], lines


def values(result: Result, scenes: str, way: str, budget: str, key: str) -> list[float]:
    """By seed, in percent."""
    wanted = (row for row in result["rows"] if key_of(row)[:3] == (scenes, way, budget))
    return [100 * row[key] for row in wanted if row[key] is not None]


def cell(result: Result, scenes: str, way: str, budget: str) -> str:
    """As in "41.2 (40.8 to 41.9) [22.3]"."""
    found = values(result, scenes, way, budget, "miou")
    if not found:
        return ""
    text = mean_and_range(found)
    asked = values(result, scenes, way, budget, "asked_miou")
    return text + (f" [{sum(asked) / len(asked):.1f}]" if asked else "")


def draw(result: Result, path: Path) -> None:
    """A panel for each kind of scenes: a bar for each way, a point for each seed."""
    scenes = unique(row["scenes"] for row in result["rows"])
    ways = unique((row["way"], row["budget"]) for row in result["rows"])
    figure, panels = picture.panels(len(scenes), 3.4, 4.2)
    for axes, each in zip(panels, scenes, strict=True):
        for place, (way, budget) in enumerate(ways):
            found = values(result, each, way, budget, "miou")
            if found:
                colour = "tab:orange" if way == "full" else ("tab:blue" if budget == "steps" else "tab:cyan")
                axes.barh(place, sum(found) / len(found), color=colour, alpha=0.6)
                axes.plot(found, [place] * len(found), "k.", markersize=4)
        axes.set_yticks(range(len(ways)), [w if w == "full" else f"{w}, {b}" for w, b in ways])
        axes.invert_yaxis()
        axes.set(title=each, xlabel="mIoU at full size, %")
    picture.save(figure, path)
