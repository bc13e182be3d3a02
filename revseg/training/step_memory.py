"""What a step of a run takes: predicted before it runs, and what to say when it does not fit."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from revseg.memory.budget import bytes_of
from revseg.memory.measure import is_countable, peak_bytes
from revseg.memory.predict import predict
from revseg.models.policy import MEMORY_LEVELS
from revseg.training.folder import Parts, Progress
from revseg.training.settings import TrainSettings
from revseg.training.setup import DTYPES, Batch, build_model, choose_device, create_criterion


class MemoryExhaustedError(RuntimeError):
    """A step that does not fit, with what would."""


def predicted_step(settings: TrainSettings, num_classes: int, size: Sequence[int]) -> int:
    """Predicted peak bytes of a training step, beyond the network, images and labels.

    Args:
        settings: Say the network, its memory level, precision, batch and device.
        num_classes: C.
        size: (H, W) of the images.
    """
    images = torch.empty(settings.batch, 3, *size, dtype=torch.uint8, device="meta")
    prediction = predict(
        build_model(settings, num_classes, save_activations=settings.save_activations),
        images,
        create_criterion(settings, None),
        target=torch.empty(settings.batch, *size, dtype=torch.uint8, device="meta"),
        autocast=None if settings.precision == "float32" else DTYPES[settings.precision],
        device=choose_device(settings.device),
    )
    return prediction.step_bytes


def counted(step: Callable[[], float], parts: Parts, progress: Progress, some: Sequence[Batch]) -> float:
    """The loss of a step, whose peak of memory is measured if that of the run is not known yet.

    Args:
        step: Computes the gradients, and returns the loss. Not the first of a program, which makes what stays.
        parts: What it trains.
        progress: Keeps the measured bytes, beyond the network, images and labels.
        some: The batches of the step.
    """
    device = next(parts.model.parameters()).device
    if progress.peak is not None or not is_countable(device):
        return step()
    parts.optimizer.zero_grad(set_to_none=True)  # the gradients of the step count, those before it do not
    losses: list[float] = []
    peak = peak_bytes(lambda: losses.append(step()), device)
    copied = 0 if device.type == "cpu" else sum(part.nbytes for part in some[0])
    progress.peak = peak - copied
    return losses[0]


def level_within(settings: TrainSettings, num_classes: int, size: Sequence[int]) -> TrainSettings:
    """The settings with the fastest memory level whose predicted step fits the budget.

    Raises:
        ValueError: If none does, with what would.
    """
    assert settings.budget is not None
    budget = bytes_of(settings.budget)
    for level in reversed(MEMORY_LEVELS):
        if predicted_step(replace(settings, memory=level), num_classes, size) <= budget:
            return replace(settings, memory=level)
    raise ValueError(
        f"no memory level of {settings.model} fits --budget {settings.budget}: "
        + advice(settings, num_classes, size, budget)
    )


def advice(settings: TrainSettings, num_classes: int, size: Sequence[int], room: int) -> str:
    """What is predicted for these settings, and the level and batch that fit."""
    needed = predicted_step(settings, num_classes, size)
    said = f"a step at --memory {settings.memory} --batch {settings.batch} is predicted to take {mebibytes(needed)}"
    plain = replace(settings, save_activations=False)
    tried = [(level, plain.batch) for level in reversed(MEMORY_LEVELS)]
    batch = plain.batch
    while batch > 1:
        batch //= 2
        tried.append((MEMORY_LEVELS[0], batch))
    for level, batch in tried:
        if level == settings.memory and batch == settings.batch and not settings.save_activations:
            continue
        peak = predicted_step(replace(plain, memory=level, batch=batch), num_classes, size)
        if peak <= min(room, needed - 1):
            return f"{said}; --memory {level} --batch {batch} would take {mebibytes(peak)}"
    return f"{said}, and so much is not there at any level and batch: give a smaller --size or --crop"


def mebibytes(count: int) -> str:
    """Bytes as text."""
    return f"{count / 2**20:,.0f} MiB"
