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
from torch.utils.data import DataLoader

from revseg.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, save_weights, write_text
from revseg.data import SegmentationDataset
from revseg.losses import UpsampleCrossEntropy, predict_labels
from revseg.memory import peak_bytes
from revseg.metrics import ConfusionMatrix
from revseg.models import load_model
from revseg.ops import upsample_cross_entropy
from revseg.prepare import Batch, build_model, choose_device, create_loader, create_split, enet_class_weights
from revseg.report import draw_curves, draw_samples, epoch_line, memory_table, result_table, step_progress
from revseg.seeds import random_state, restore_random_state, seed_epoch, seed_everything
from revseg.sequence import set_save_activations
from revseg.settings import OUTPUTS, TrainSettings

Record = dict[str, Any]  # an epoch in the log

FREE_ON_RESUME = (
    "root",
    "memory",
    "save_activations",
    "device",
    "threads",
    "workers",
    "out",
    "resume",
    "overwrite",
)
SAMPLES_DRAWN = 4


class DivergedError(RuntimeError):
    """A loss that is no longer a finite number."""


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
                _divergence("validation loss", val_loss, (epoch + 1) * len(train_batches), epoch)
            )
        record: Record = {
            "epoch": epoch + 1,
            "loss": loss,
            "val_loss": val_loss,
            "lr": optimizer.param_groups[0]["lr"],
            "miou": _number(matrix.mean_iou()),
            "pixel_accuracy": _number(matrix.pixel_accuracy()),
            "iou": dict(zip(names, map(_number, matrix.iou().tolist()), strict=True)),
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


def train_epoch(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: DataLoader[Batch],
    settings: TrainSettings,
    epoch: int,
    console: Console,
) -> float:
    """The mean loss of an epoch, in which the model sees every batch once."""
    model.train()
    device = next(model.parameters()).device
    steps = len(batches)
    seed_epoch(batches, settings.seed, epoch)
    total = 0.0
    with step_progress(console, f"epoch {epoch + 1}/{settings.epochs}", steps) as show:
        for step, (images, labels) in enumerate(batches, start=epoch * steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * (1 - step / (steps * settings.epochs)) ** settings.power
            optimizer.zero_grad(set_to_none=True)
            loss = criterion(model(images.to(device)), labels.to(device))
            value = loss.item()
            if not math.isfinite(value):
                raise DivergedError(_divergence("loss", value, step + 1, epoch))
            loss.backward()
            del loss  # else its graph would live through the next forward pass
            optimizer.step()
            total += value
            show(value)
    return total / steps


@torch.no_grad()
def validate(
    model: nn.Module, batches: DataLoader[Batch], num_classes: int, device: torch.device
) -> tuple[ConfusionMatrix, float]:
    """Counts of the pixels of all batches, and the mean over images of the unweighted loss."""
    model.eval()
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    total, count = 0.0, 0
    for images, labels in batches:
        logits, labels = model(images.to(device)), labels.to(device)
        for scores, label in zip(logits.split(1), labels.split(1), strict=True):
            total, count = total + float(upsample_cross_entropy(scores, label, counts=counts)), count + 1
    matrix = ConfusionMatrix(num_classes)
    matrix.add(counts)
    return matrix, total / count


def save_epoch(
    settings: TrainSettings, model: nn.Module, optimizer: torch.optim.Optimizer, history: Sequence[Record]
) -> None:
    """Writes the weights if they are the best so far, the checkpoint, and a line of the log."""
    record = history[-1]
    if best_epoch(history) is record:
        description = {
            "model": settings.model,
            "num_classes": len(record["iou"]),
            "hyperparameters": settings.hyperparameters(),
            "classes": list(record["iou"]),
            "epoch": record["epoch"],
            "miou": record["miou"],
        }
        save_weights(settings.out / "best.safetensors", model.state_dict(), description)
    state = {"settings": settings.as_json(), "history": list(history), "random": random_state()}
    state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_checkpoint(settings.out / "last.pt", state)
    with open(settings.out / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")


def resume(settings: TrainSettings, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Record]:
    """The epochs done so far; model, optimizer and random state become what they were after them.

    Raises:
        CheckpointError: If the checkpoint is damaged or from elsewhere.
        ValueError: If it is from a run with other settings.
    """
    path = settings.out / "last.pt"
    state = load_checkpoint(path)
    try:
        now = settings.as_json()
        for key, then in state["settings"].items():
            if key not in FREE_ON_RESUME and now.get(key) != then:
                flag = "--" + key.replace("_", "-")
                raise ValueError(f"cannot resume {path}: {flag} was {then} and is now {now.get(key)}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        restore_random_state(state["random"])
        history: list[Record] = state["history"]
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} does not fit this version of revseg: {error}") from error
    return history


def prepare_folder(settings: TrainSettings, history: Sequence[Record]) -> None:
    """Makes the folder, removes what a replaced run left in it, starts or cuts the log."""
    settings.out.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS:
        if settings.overwrite:
            (settings.out / name).unlink(missing_ok=True)
    write_text(settings.out / "settings.json", json.dumps(settings.as_json(), indent=2) + "\n")
    write_text(settings.out / "log.jsonl", "".join(json.dumps(record) + "\n" for record in history))


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


def best_epoch(history: Sequence[Record]) -> Record:
    """The first of the epochs with the highest mIoU."""
    return max(history, key=lambda record: -1.0 if record["miou"] is None else record["miou"])


def count_parameters(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _divergence(what: str, value: float, step: int, epoch: int) -> str:
    kept = f"last.pt holds the end of epoch {epoch}" if epoch else "there is no checkpoint yet"
    return f"the {what} became {value} at step {step}, epoch {epoch + 1}; {kept}"


def _number(value: float) -> float | None:
    """A number as JSON knows it, which has no NaN."""
    return value if math.isfinite(value) else None
