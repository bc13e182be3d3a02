"""`revseg evaluate`: the scores of a network on labelled images, from one confusion matrix over all of them.

Under torchrun every process takes its share of the images, and their counts are added up.
"""

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import distributed

from revseg.data import create_dataset
from revseg.data.cityscapes import Cityscapes
from revseg.data.lights import light_of
from revseg.files import finite_or_none, write_text
from revseg.inference.augmented import Augmentation
from revseg.inference.automatic import AutomaticRunner
from revseg.inference.instances import InstanceScores
from revseg.inference.matrix import CITYSCAPES_CATEGORIES, category_iou, draw_matrix, matrix_csv
from revseg.inference.settings import EvaluateSettings
from revseg.inference.trained import load
from revseg.inference.windows import Windows
from revseg.metrics import ConfusionMatrix
from revseg.training.choices import key_values
from revseg.training.report import result_table
from revseg.training.setup import choose_device


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Scores the network and writes the results.

    Args:
        settings: What the command line says.

    Returns:
        What is also in `evaluation.json`.

    Raises:
        FileNotFoundError: If the weights or the data set are missing.
        ImportError: If packages of the runtime are not installed.
        RuntimeFailedError: If the runtime cannot run the network.
        ValueError: If network and data set have other classes, there is no such light, or no pixel has a label.
    """
    light = light_of(settings.light)
    console = Console(highlight=False)
    device = choose_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    options = key_values("--data-args", settings.data_args)
    tell = partial(console.print, markup=False, soft_wrap=True)
    model = load(settings.weights).to(device).with_runtime(settings.runtime, tell)
    dataset = create_dataset(
        settings.data,
        settings.split,
        root=settings.root,
        size=settings.size,
        seed=settings.seed,
        samples=settings.samples,
        **options,
    )
    model.check_classes(settings.data, dataset.classes)
    settings.out.mkdir(parents=True, exist_ok=True)
    augmentation = Augmentation.of(settings.scales, settings.flip)
    windows = Windows.of(settings.window, settings.overlap)
    rank, world = _processes()
    matrix, objects = ConfusionMatrix(len(model.classes)), InstanceScores(model.classes.names)
    started = time.perf_counter()
    for i in range(rank, len(dataset), world):
        if isinstance(model.network, AutomaticRunner):
            model.network.expect(i // world, -(-(len(dataset) - i) // world))
        image, label = dataset[i]
        predicted = model.predict(light(image), windows=windows, augmentation=augmentation)
        matrix.update(predicted[None], label[None])
        if settings.instances:
            assert isinstance(dataset, Cityscapes)
            objects.update(predicted, label, dataset.load_instances(i))
    if world > 1:
        distributed.all_reduce(matrix.tally)
        if settings.instances:
            distributed.all_reduce(objects.tally)
    counts = matrix.counts()
    if not int(counts.sum()):
        raise ValueError(f"no pixel of {settings.data}, {settings.split} has a label")
    iou = {
        name: finite_or_none(value)
        for name, value in zip(model.classes.names, matrix.iou().tolist(), strict=True)
    }
    result: dict[str, Any] = {
        "weights": str(settings.weights),
        "data": settings.data,
        "split": settings.split,
        "samples": len(dataset),
        "size": settings.size,
        "light": settings.light,
        "window": settings.window,
        "scales": settings.scales,
        "flip": settings.flip,
        "runtime": settings.runtime,
        "miou": finite_or_none(matrix.mean_iou()),
        "pixel_accuracy": finite_or_none(matrix.pixel_accuracy()),
        "iou": iou,
        "seconds": round(time.perf_counter() - started, 3),
        "network": model.description,
    }
    if set(CITYSCAPES_CATEGORIES) >= set(model.classes.names):
        result["category_iou"] = category_iou(counts, model.classes.names)
    if settings.instances:
        result["instance_iou"] = objects.iou(counts)
        result["category_instance_iou"] = objects.category_iou(counts)
    if rank == 0:
        write_results(settings.out, result, counts, model.classes.names)
        console.print(result_table(f"IoU on {settings.data}, {settings.split}", iou, result["miou"]))
        if settings.instances:
            found = [value for value in result["instance_iou"].values() if value is not None]
            console.print(
                f"mean iIoU {100 * sum(found) / len(found):.2f} %" if found else "no instance occurs"
            )
        console.print(
            f"pixel accuracy {100 * result['pixel_accuracy']:.2f} %; everything is in {settings.out}",
            markup=False,
        )
    return result


def write_results(out: Path, result: dict[str, Any], counts: torch.Tensor, names: tuple[str, ...]) -> None:
    """Writes evaluation.json, confusion.csv, and confusion.png if matplotlib is installed."""
    write_text(out / "evaluation.json", json.dumps(result, indent=2) + "\n")
    write_text(out / "confusion.csv", matrix_csv(counts, names))
    draw_matrix(out / "confusion.png", counts, names)


def _processes() -> tuple[int, int]:
    """This process's number and how many there are; torchrun says both in the environment."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
