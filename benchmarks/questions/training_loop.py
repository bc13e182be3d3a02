"""What does the training program add to a step, in time and in memory?

Time: an epoch of `train_epoch` over samples that lie in memory, beside the same forward pass, backward pass and step of the
optimizer written out in a loop, on the same network and batches, in turns. Memory: the peak of a step of
`revseg train` on frames of 1024 x 2048 in Cityscapes' folders, as the program itself makes batch, network and optimizer.

    python -m benchmarks measure training_loop
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import Result, Results, Row
from benchmarks.tables import Table, markdown, quartiles, source
from benchmarks.timing import in_turns, spread
from revseg.data.base import SegmentationDataset
from revseg.data.classes import CITYSCAPES
from revseg.data.synthetic.dataset import SyntheticStreets
from revseg.data.synthetic.export import write_cityscapes
from revseg.memory import peak_bytes
from revseg.training.distributed import Team
from revseg.training.folder import Progress
from revseg.training.loop import first_batch, gradients, make_step, train_epoch
from revseg.training.optimize import create_optimizer
from revseg.training.settings import TrainSettings
from revseg.training.setup import build_model, create_criterion, create_loader, create_parts, create_split

QUESTION = "What does the training program add to a step, in time and in memory?"
ORDER = 12.5
STEPS = 4
SIZES = ((128, 256), (256, 512))
FRAMES = (1024, 2048)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--frames", type=int, nargs=2, default=FRAMES, metavar=("H", "W"))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"steps": STEPS, "threads": 1}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    torch.set_num_threads(1)
    rows: list[Row] = []
    for size in SIZES:
        rows.append(time_of(size, args.rounds))
        yield rows
    for precision in ("float32", "bfloat16"):
        rows.append(memory_of(tuple(args.frames), precision))
        yield rows


class InMemory(SegmentationDataset):
    """Samples that take no time to load."""

    def __init__(self, samples: list[tuple[Tensor, Tensor]]):
        super().__init__(CITYSCAPES, [str(i) for i in range(len(samples))], None, seed=0, size=None)
        self.samples = samples

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        return self.samples[index]


def time_of(size: tuple[int, int], rounds: int) -> Row:
    """How long an epoch takes in the program, over the same steps written out."""
    told = TrainSettings(size=size, batch=4, threads=1, epochs=10**6)
    scenes = SyntheticStreets("train", size=size, samples=4 * STEPS)
    program, bare = epoch_of(told, InMemory([scenes.load(i) for i in range(len(scenes))]))
    program(), bare()
    pairs = in_turns(bare, program, rounds)
    return {
        "of": "time",
        "size": list(size),
        "batch": told.batch,
        "seconds": round(spread([b for b, _ in pairs])["median"] / STEPS, 4),
        "ratio": spread([p / b for b, p in pairs]),
    }


def epoch_of(
    told: TrainSettings, samples: InMemory
) -> tuple[Callable[[], nn.Module], Callable[[], nn.Module]]:
    """An epoch of the program, and of the loop that any tutorial would write; each gives its network."""
    torch.manual_seed(0)
    model = build_model(told, len(samples.classes), save_activations=False)
    criterion = create_criterion(told, None)
    twin = copy.deepcopy(model)
    parts = create_parts(told, model, Team(), torch.device("cpu"), {})
    loader, progress = create_loader(samples, told, shuffle=True), Progress()
    batches = list(loader)
    optimizer = create_optimizer(told, twin)

    def program() -> nn.Module:
        progress.step = 0
        train_epoch(parts, criterion, loader, told, progress, save=lambda: None)
        return parts.model

    def bare() -> nn.Module:
        twin.train()
        for images, labels in batches:
            optimizer.zero_grad(set_to_none=True)
            loss = criterion(twin(images), labels)
            loss.backward()
            optimizer.step()
            loss.item()
        return twin

    return program, bare


def memory_of(frames: tuple[int, ...], precision: str) -> Row:
    """The peak of a step of `revseg train` on Cityscapes' folders: images, labels and network as the program makes them."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for split, seed in (("train", 0), ("val", 1)):
            scenes = SyntheticStreets(split, size=(frames[0], frames[1]), samples=4, seed=seed)
            write_cityscapes(scenes, root, split)
        told = TrainSettings(
            data="cityscapes", root=root, batch=4, memory="lowest", precision=precision, threads=1
        )
        batch = first_batch(create_loader(create_split(told, "train"), told, shuffle=True))
    model = build_model(told, 19, save_activations=False)
    criterion, team = create_criterion(told, None), Team()
    parts = create_parts(told, model, team, torch.device("cpu"), {})
    parts.model.train()
    kept = sum(x.numel() * x.element_size() for x in (*batch, *model.parameters(), *model.buffers()))

    def step() -> None:
        gradients(parts, criterion, [batch], told, team)
        make_step(parts, told)

    peak = peak_bytes(step, before=step)
    moments = sum(x.numel() * x.element_size() for s in parts.optimizer.state.values() for x in s.values())
    return {
        "of": "memory",
        "size": list(frames),
        "batch": 4,
        "precision": precision,
        "memory": "lowest",
        "step_mib": round(peak / 2**20, 1),
        "kept_mib": round((kept + moments) / 2**20, 1),
    }


HEAD = """\
## What the training program adds to a step

Time: an epoch of `revseg train`, with learning rates, checks of the loss and signals, over the same steps written out in a
loop; samples lie in memory, median and quartiles of rounds in turns. Memory: the peak of a step on frames in
Cityscapes' folders, batch 4, `--memory lowest`, and what stands before it: images, labels, weights, moments of the optimizer.
"""


def sections(results: Results) -> list[str]:
    result = results.get("training_loop")
    if not result:
        return []
    return [HEAD + "\n" + markdown(times(result)) + "\n" + markdown(peaks(result)) + "\n" + source(result)]


def times(result: Result) -> Table:
    rows = [
        [
            f"{row['batch']} x 3 x {row['size'][0]} x {row['size'][1]}",
            f"{row['seconds']:.3f}",
            quartiles(row["ratio"]),
        ]
        for row in result["rows"]
        if row["of"] == "time"
    ]
    return ["images", "seconds of a step, written out", "time in the program / written out"], rows


def peaks(result: Result) -> Table:
    rows = [
        [
            f"{row['batch']} x 3 x {row['size'][0]} x {row['size'][1]}, {row['precision']}",
            f"{row['step_mib']:.0f}",
            f"{row['kept_mib']:.0f}",
            f"{row['step_mib'] + row['kept_mib']:.0f}",
        ]
        for row in result["rows"]
        if row["of"] == "memory"
    ]
    return ["images", "step, MiB", "standing, MiB", "together, MiB"], rows
