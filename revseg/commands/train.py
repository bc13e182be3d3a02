"""Training, in one straight line: settings, data, model, optimizer, loop.

After every epoch the run can be continued from `last.pt` as if it had never stopped: the weights
come out equal to the bit. So whatever an epoch depends on is either in that file or follows from
the seed and the number of the epoch.
"""

import copy
import json
import math
import platform
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from revseg.data import SegmentationDataset
from revseg.files import write_text
from revseg.losses import UpsampleCrossEntropy, predict_labels
from revseg.memory import peak_bytes
from revseg.models import load_model
from revseg.sequence import set_save_activations
from revseg.training.loop import DivergedError, divergence, train_epoch, validate
from revseg.training.random_state import seed_everything
from revseg.training.report import (
    draw_curves,
    draw_samples,
    epoch_line,
    memory_table,
    result_table,
)
from revseg.training.run import Record, best_epoch, finite_or_none, prepare_folder, resume, save_epoch
from revseg.training.settings import TrainSettings
from revseg.training.setup import (
    Batch,
    build_model,
    choose_device,
    create_loader,
    create_split,
    enet_class_weights,
)

SAMPLES_DRAWN = 4


def train(settings: TrainSettings) -> dict[str, Any]:
    """Trains a network and writes all that is known about it into `settings.out`.

    Args:
        settings: What the command line says.

    Returns:
        The summary that is also in `summary.json`.

    Raises:
        ValueError: If a setting, a folder, a file of the data set or a checkpoint is unfit.
        DivergedError: If the loss stops being finite; the last checkpoint stays.
    """
    settings.check_folders()
    console = Console(highlight=False)
    device = choose_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    seed_everything(settings.seed)

    train_set, val_set = create_split(settings, "train", augment=True), create_split(settings, "val")
    train_batches = create_loader(train_set, settings, shuffle=True)
    val_batches = create_loader(val_set, settings, shuffle=False)
    names = train_set.classes.names

    model = build_model(settings, len(names), save_activations=settings.save_activations).to(device)
    optimizer = torch.optim.Adam(
        model.parameters(), settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
    )
    history = resume(settings, model, optimizer) if settings.resume else []
    weights = (
        enet_class_weights(create_split(settings, "train")) if settings.class_weights == "enet" else None
    )
    criterion = UpsampleCrossEntropy(weight=weights).to(device)

    prepare_folder(settings, history)
    console.print(
        f"{settings.model}: {count_parameters(model):,} parameters, {len(names)} classes, on {device}"
    )
    console.print(f"{settings.data}: {len(train_set)} samples for training, {len(val_set)} for validation")
    for epoch in range(len(history), settings.epochs):
        started = time.perf_counter()
        loss = train_epoch(model, criterion, optimizer, train_batches, settings, epoch, console)
        matrix, val_loss = validate(model, val_batches, len(names), device)
        if not math.isfinite(val_loss):  # the last step can spoil the weights after its loss was fine
            raise DivergedError(
                divergence("validation loss", val_loss, (epoch + 1) * len(train_batches), epoch)
            )
        record: Record = {
            "epoch": epoch + 1,
            "loss": loss,
            "val_loss": val_loss,
            "lr": optimizer.param_groups[0]["lr"],
            "miou": finite_or_none(matrix.mean_iou()),
            "pixel_accuracy": finite_or_none(matrix.pixel_accuracy()),
            "iou": dict(zip(names, map(finite_or_none, matrix.iou().tolist()), strict=True)),
            "seconds": round(time.perf_counter() - started, 3),
        }
        history.append(record)
        save_epoch(settings, model, optimizer, history)
        console.print(epoch_line(record, settings.epochs))

    batch = next(iter(train_batches))
    peaks = compare_memory(settings, model, criterion, batch, device)
    summary = write_results(settings, history, peaks, val_set, device)
    best = best_epoch(history)
    console.print(result_table(best["iou"], best["miou"], best["epoch"]))
    console.print(memory_table(peaks, batch[0].shape))
    console.print(
        f"Everything is in {settings.out}; image, label and prediction: {settings.out / 'samples.png'}"
    )
    return summary


def compare_memory(
    settings: TrainSettings, model: nn.Module, criterion: nn.Module, batch: Batch, device: torch.device
) -> dict[str, int]:
    """Peak bytes of a training step on a batch, for both memory modes of the same network."""
    images, labels = (tensor.to(device) for tensor in batch)
    peaks = {}
    for mode in ("reversible", "saved"):
        twin = copy.deepcopy(model).train()
        set_save_activations(twin, mode == "saved")

        def step(twin: nn.Module = twin) -> None:
            twin.zero_grad(set_to_none=True)
            criterion(twin(images), labels).backward()

        peaks[mode] = peak_bytes(step, device, before=step)
    return peaks


def write_results(
    settings: TrainSettings,
    history: Sequence[Record],
    peaks: dict[str, int],
    val_set: SegmentationDataset,
    device: torch.device,
) -> dict[str, Any]:
    """Draws the curves and the samples, writes the summary and returns it."""
    draw_curves(settings.out / "curves.png", history)
    model = load_model(settings.out / "best.safetensors").to(device)
    draw_samples(settings.out / "samples.png", predict_samples(model, val_set, device), val_set.classes)
    summary = {
        "settings": settings.as_json(),
        "parameters": count_parameters(model),
        "best": best_epoch(history),
        "last": history[-1],
        "seconds": round(sum(record["seconds"] for record in history), 3),
        "peak_bytes": peaks,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }
    write_text(settings.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


@torch.no_grad()
def predict_samples(
    model: nn.Module, dataset: SegmentationDataset, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Image [3, H, W], label [H, W] and prediction [H, W] of samples spread over the data set."""
    count = min(SAMPLES_DRAWN, len(dataset))
    rows = []
    for i in range(count):
        image, label = dataset[i * len(dataset) // count]
        predicted = predict_labels(model(image[None].to(device)), label.shape)[0]
        rows.append((image, label, predicted.cpu()))
    return rows


def count_parameters(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
