"""What a step of a run takes: predicted before it runs, and what to say when it does not fit."""

import os
import resource
from collections.abc import Sequence
from dataclasses import replace

import torch

from revseg.memory import predicted_peak_bytes
from revseg.models.policy import MEMORY_LEVELS
from revseg.training.choices import parsed_bytes
from revseg.training.settings import TrainSettings
from revseg.training.setup import autocast, build_model, create_criterion


class MemoryExhaustedError(RuntimeError):
    """A step that does not fit, with what would."""


def predicted_step(settings: TrainSettings, num_classes: int, size: Sequence[int]) -> int:
    """Predicted peak bytes of a training step, beyond the network itself.

    Args:
        settings: Say the network, its memory level, precision and batch.
        num_classes: C.
        size: (H, W) of the images.
    """

    def prepare():  # type: ignore[no-untyped-def]
        model = build_model(settings, num_classes, save_activations=settings.save_activations)
        criterion = create_criterion(settings, None)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

        def step() -> None:
            images = torch.zeros(settings.batch, 3, *size, dtype=torch.uint8)
            labels = torch.zeros(settings.batch, *size, dtype=torch.uint8)
            with autocast(settings, images.device):
                loss = criterion(model(images), labels)
            loss.backward()

        return step

    return predicted_peak_bytes(prepare)


def level_within(settings: TrainSettings, num_classes: int, size: Sequence[int]) -> TrainSettings:
    """The settings with the fastest memory level whose predicted step fits the budget.

    Raises:
        ValueError: If none does, with what would.
    """
    assert settings.budget is not None
    budget = parsed_bytes(settings.budget)
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


def is_memory_error(error: BaseException) -> bool:
    """Whether memory of the CPU or the GPU ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        words in text
        for words in ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc")
    )


def free_bytes(device: torch.device) -> int:
    """Bytes that this process could still allocate on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = _available_bytes()
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free = min(free, limit - _mapped_bytes())
    return max(0, free)


def _available_bytes() -> int:
    """Memory of the machine that is free or can be freed."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _mapped_bytes() -> int:
    """Address space of this process."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def mebibytes(count: int) -> str:
    """Bytes as text."""
    return f"{count / 2**20:,.{1 if count < 10 * 2**20 else 0}f} MiB"
