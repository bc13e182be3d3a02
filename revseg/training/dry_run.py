"""What a run is going to do and take, before it does: the answer to --dry-run."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from revseg.memory.room import free_bytes
from revseg.training.distributed import Team
from revseg.training.settings import TrainSettings
from revseg.training.step_memory import mebibytes, predicted_step


def predicted_peak(
    settings: TrainSettings, num_classes: int, size: Sequence[int], console: Console
) -> int | None:
    """Predicted peak bytes of a step, also printed; None if it cannot be predicted."""
    try:
        peak = predicted_step(settings, num_classes, size)
    except Exception as error:  # noqa: BLE001, good to have, and no reason not to train
        console.print(f"the memory of a step cannot be predicted: {' '.join(str(error).split())[:200]}")
        return None
    batch = f"{settings.batch} x 3 x {size[0]} x {size[1]}"
    console.print(f"a step on {batch} at --memory {settings.memory} is predicted to take {mebibytes(peak)}")
    return peak


def show_plan(
    settings: TrainSettings,
    steps: int,
    peak: int | None,
    size: Sequence[int],
    device: torch.device,
    team: Team,
    console: Console,
) -> dict[str, Any]:
    """Prints what the run would do, and returns it."""
    free = free_bytes(device)
    plan = {
        "network": f"{settings.model} {' '.join(settings.model_args)}".strip(),
        "memory level": "activations stored" if settings.save_activations else settings.memory,
        "device": str(device),
        "precision": settings.precision,
        "processes": team.size,
        "batch of a process": f"{settings.batch} x 3 x {size[0]} x {size[1]}",
        "samples of a step": settings.batch * settings.accumulate * team.size,
        "steps of an epoch": steps,
        "epochs": settings.epochs,
        "steps": steps * settings.epochs,
        "loss": settings.loss,
        "class weights": settings.class_weights,
        "optimizer": f"{settings.optimizer}, lr {settings.lr:g}, {settings.schedule}, warm-up {settings.warmup}",
        "predicted peak": "unknown" if peak is None else mebibytes(peak),
        "free memory": mebibytes(free),
        "folder": str(settings.out),
    }
    table = Table(title="Plan", show_header=False)
    for key, value in plan.items():
        table.add_row(key, str(value))
    console.print(table)
    if peak is not None and peak > free:
        console.print("this does not fit: give a lower --memory, --batch or --size")
    return {**plan, "predicted_peak_bytes": peak, "free_bytes": free}
