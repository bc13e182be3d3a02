"""An epoch of training, and of validation."""

import math

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from revseg.metrics import ConfusionMatrix
from revseg.ops import upsample_cross_entropy
from revseg.training.random_state import seed_epoch
from revseg.training.report import step_progress
from revseg.training.settings import TrainSettings
from revseg.training.setup import Batch


class DivergedError(RuntimeError):
    """A loss that is no longer a finite number."""


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
                raise DivergedError(divergence("loss", value, step + 1, epoch))
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


def divergence(what: str, value: float, step: int, epoch: int) -> str:
    """The message of a `DivergedError`, with what is left of the run."""
    kept = f"last.pt holds the end of epoch {epoch}" if epoch else "there is no checkpoint yet"
    return f"the {what} became {value} at step {step}, epoch {epoch + 1}; {kept}"
