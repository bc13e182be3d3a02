"""Does the loader of `revseg train` keep up with the steps?

Images a second of the loader, with every random change, on Cityscapes' folders of generated frames: decoded from PNG and
from the cache of `revseg data cache`, by the main process and by one and two others. Beside them what a step of VNet takes
on this machine: a loader that gives more images a second than the steps take costs nothing with a process of its own.

    python -m benchmarks measure loader
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import Result, Results, Row
from benchmarks.tables import Table, markdown, source
from revseg.commands.data import CacheSettings, cache
from revseg.data.synthetic.dataset import SyntheticStreets
from revseg.data.synthetic.export import write_cityscapes
from revseg.training.distributed import Team
from revseg.training.loop import gradients, make_step
from revseg.training.settings import TrainSettings
from revseg.training.setup import build_model, create_criterion, create_loader, create_parts, create_split

QUESTION = "Does the loader of `revseg train` keep up with the steps?"
ORDER = 12.7
FRAMES = 24  # many against those that two processes make ahead
WORKERS = (0, 1, 2)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("H", "W"))
    parser.add_argument(
        "--rounds", type=int, default=3, help="epochs of the loader, of which the fastest counts"
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"size": list(args.size), "batch": 2, "frames": FRAMES, "threads": 1}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    torch.set_num_threads(1)
    rows: list[Row] = []
    size = (args.size[0], args.size[1])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for split in ("train", "val"):
            write_cityscapes(SyntheticStreets(split, size=size, samples=FRAMES), root / "frames", split)
        cache(CacheSettings(data="cityscapes", root=root / "frames", out=root / "cache", splits=("train",)))
        told = TrainSettings(
            data="cityscapes",
            root=root / "frames",
            batch=2,
            scale=(0.5, 2.0),
            crop=size,
            photometric="strong",
        )
        for kind, options in (("PNG", ()), ("cache", (f"cache={root / 'cache'}",))):
            for workers in WORKERS:
                each = replace(told, data_args=options, workers=workers)
                rows.append({"of": kind, "workers": workers, "images_s": loaded(each, args.rounds)})
                yield rows
        for memory in ("fastest", "lowest"):
            rows.append(
                {
                    "of": f"a step, --memory {memory}",
                    "images_s": trained(replace(told, memory=memory), args.rounds),
                }
            )
            yield rows


def loaded(told: TrainSettings, rounds: int) -> float:
    """Images a second of an epoch, once the batches are gone that processes make ahead: the best of some epochs."""
    loader = create_loader(create_split(told, "train", augment=True), told, shuffle=True)
    best = 0.0
    for epoch in range(rounds):
        loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = iter(loader)
        for _ in range(1 + 2 * told.workers):
            next(batches)
        started = time.perf_counter()
        count = sum(len(images) for images, _ in batches)
        best = max(best, count / (time.perf_counter() - started))
    return round(best, 2)


def trained(told: TrainSettings, rounds: int) -> float:
    """Images a second of steps on one batch, the best of some."""
    batch = next(iter(create_loader(create_split(told, "train", augment=True), told, shuffle=True)))
    team, criterion = Team(), create_criterion(told, None)
    parts = create_parts(told, build_model(told, 19, save_activations=False), team, torch.device("cpu"), {})
    parts.model.train()
    times = []
    for _ in range(rounds + 1):  # the first makes what is made once
        started = time.perf_counter()
        gradients(parts, criterion, [batch], told, team)
        make_step(parts, told)
        times.append(time.perf_counter() - started)
    return round(told.batch / min(times[1:]), 2)


HEAD = """\
## The loader beside the steps

Images a second, with random scale, crop, mirror image and strong changes of light, from frames in Cityscapes' folders. With
processes of their own samples are made beside the steps; without, before them.
"""


def sections(results: Results) -> list[str]:
    result = results.get("loader")
    return [HEAD, markdown(table(result)), source(result)] if result else []


def table(result: Result) -> Table:
    lines = []
    for row in result["rows"]:
        how = (
            f"{row['workers']} process{'' if row['workers'] == 1 else 'es'}"
            if "workers" in row
            else "1 thread"
        )
        lines.append([f"{row['of']}, {how}", f"{row['images_s']:.2f}"])
    height, width = result["settings"]["size"]
    return [f"{height} x {width}", "images a second"], lines
