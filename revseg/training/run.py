"""The folder of a run: what each epoch leaves there, and how a run goes on from it.

After every epoch the run can be continued from `last.pt` as if it had never stopped: the weights
come out equal to the bit. So whatever an epoch depends on is either in that file or follows from
the seed and the number of the epoch.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from revseg.files import CheckpointError, save_weights, write_text
from revseg.training.checkpoint import load_checkpoint, save_checkpoint
from revseg.training.random_state import random_state, restore_random_state
from revseg.training.settings import OUTPUTS, TrainSettings

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


def best_epoch(history: Sequence[Record]) -> Record:
    """The first of the epochs with the highest mIoU."""
    return max(history, key=lambda record: -1.0 if record["miou"] is None else record["miou"])


def finite_or_none(value: float) -> float | None:
    """A number as JSON knows it, which has no NaN."""
    return value if math.isfinite(value) else None
