"""The folder of a run: what it leaves there, and how it goes on from it.

A run can be continued from `last.pt` as if it had never stopped, also in the middle of an epoch:
the weights come out equal to the bit. So whatever a step depends on is either in that file or
follows from the seed, the epoch and the step.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from revseg.files import CheckpointError, save_weights, write_atomically, write_text
from revseg.training.checkpoint import load_checkpoint, save_checkpoint
from revseg.training.choices import flag
from revseg.training.distributed import Team, full_state, full_weights, inner, load_full_state
from revseg.training.random_state import random_state, restore_random_state
from revseg.training.settings import OUTPUTS, TrainSettings

Record = dict[str, Any]  # an epoch in the log
Facts = Mapping[str, object]  # what the settings came to here: samples, threads, processes

NUMBERED = re.compile(r"(epoch-\d+\.pt|samples-\d+\.png)")

FREE_ON_RESUME = (
    *(
        "config",
        "root",
        "workers",
        "save_minutes",
        "save_steps",
        "keep",
        "log",
        "pictures",
        "device",
        "threads",
    ),
    *(
        "out",
        "resume",
        "overwrite",
        "allow_change",
        "dry_run",
        "weights",
        "budget",
        "train_samples",
        "val_samples",
    ),
)  # of some of them what they came to is compared instead: see `Facts`


class DivergedError(RuntimeError):
    """A loss, or weights, that are no longer finite numbers."""


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        history: The epochs that are done.
        step: Steps that are done of the next one.
        total: The sum of their losses.
        seconds: How long they took.
        saved: Whether the folder holds a checkpoint of this run.
        peak: Measured peak bytes of a step, beyond the network, images and labels.
    """

    history: list[Record] = field(default_factory=list)
    step: int = 0
    total: float = 0.0
    seconds: float = 0.0
    saved: bool = False
    peak: int | None = None

    @property
    def epoch(self) -> int:
        """The number of the epoch that is running, from 0."""
        return len(self.history)

    def finish_epoch(self, record: Record) -> None:
        """Goes to the next epoch."""
        self.history.append(record)
        self.step, self.total, self.seconds = 0, 0.0, 0.0


@dataclass
class Parts:
    """What a run trains, and keeps in its checkpoints."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    description: dict[str, Any]  # of the network, for its weights file

    def to_validate(self) -> nn.Module:
        """The network whose scores count: the averaged one, if there is one."""
        return inner(self.model) if self.ema is None else self.ema.module


def save_run(settings: TrainSettings, facts: Facts, parts: Parts, progress: Progress, team: Team) -> None:
    """Writes the checkpoint: all processes take part, the first one writes.

    Nothing of a run is in its folder before its first checkpoint, and what was there stays until then.

    Raises:
        OSError: If the disk does not take it; the checkpoint before is still there.
    """
    if not all(bool(p.isfinite().all()) for p in parts.model.parameters()):
        raise DivergedError(
            f"a weight is not finite after step {progress.step} of epoch {progress.epoch + 1}; "
            + (
                f"{settings.out / 'last.pt'} holds the run before"
                if progress.saved
                else "there is no checkpoint yet"
            )
        )
    generators = team.gather(random_state())
    weights, optimizer = full_state(parts.model, parts.optimizer)
    first, progress.saved = not progress.saved, True
    if not team.is_first:
        return
    if first and not settings.overwrite:
        _write_settings(settings)
    save_checkpoint(
        settings.out / "last.pt",
        {
            "settings": settings.as_json(),
            "facts": dict(facts),
            "history": progress.history,
            "step": progress.step,
            "total": progress.total,
            "seconds": progress.seconds,
            "peak": progress.peak,
            "random": generators,
            "model": weights,
            "optimizer": optimizer,
            "scaler": parts.scaler.state_dict(),
            "ema": {} if parts.ema is None else parts.ema.state_dict(),
        },
    )
    if first and settings.overwrite:
        for path in settings.out.iterdir():
            if (path.name in OUTPUTS and path.name != "last.pt") or NUMBERED.fullmatch(path.name):
                path.unlink()
        _write_settings(settings)
    if first:
        write_log(settings.out, progress)


def save_epoch(settings: TrainSettings, parts: Parts, progress: Progress, team: Team) -> None:
    """After the checkpoint of a whole epoch: its weights if they are the best so far, its line, its copy."""
    _save_best(settings, parts, progress, team)
    if not team.is_first:
        return
    write_log(settings.out, progress)
    if settings.keep:
        copy_of(settings.out / "last.pt", settings.out / f"epoch-{progress.epoch:04}.pt")
        for path in sorted(settings.out.glob("epoch-*.pt"))[: -settings.keep]:
            path.unlink()


def _save_best(settings: TrainSettings, parts: Parts, progress: Progress, team: Team) -> None:
    """Writes the weights of the epoch that has just ended, if it is the best so far."""
    record = progress.history[-1]
    if best_epoch(progress.history) is not record:
        return
    weights = full_weights(parts.to_validate())
    if not team.is_first:
        return
    description = {**parts.description, "epoch": record["epoch"], "miou": record["miou"]}
    save_weights(settings.out / "best.safetensors", weights, description)


def read_run(settings: TrainSettings) -> dict[str, Any]:
    """The checkpoint that a run goes on from.

    Raises:
        CheckpointError: If it is damaged or from elsewhere, with others that could be taken.
    """
    path = settings.checkpoint()
    try:
        state = load_checkpoint(path)
        kinds = {"settings": dict, "facts": dict, "history": list, "random": list, "model": dict, "step": int}
        kinds |= {"optimizer": dict, "scaler": dict, "ema": dict, "total": float, "seconds": float}
        for key, kind in kinds.items():
            if not isinstance(state.get(key), kind):
                raise CheckpointError(
                    f"{path} does not fit this version of revseg: no {kind.__name__} {key!r}"
                )
    except CheckpointError as error:
        others = [other.name for other in sorted(path.parent.glob("epoch-*.pt")) if other != path]
        advice = f"; --resume {path.parent / others[-1]} goes on from an older one" if others else ""
        raise CheckpointError(f"{error}{advice}") from error
    return state


def restore_run(
    settings: TrainSettings, state: Mapping[str, Any], facts: Facts, parts: Parts, team: Team
) -> Progress:
    """Makes network, optimizer and generators what they were, and says how far the run had come.

    Raises:
        CheckpointError: If the checkpoint does not fit the network.
        ValueError: If it is from a run with other settings.
    """
    path = settings.checkpoint()
    _check_unchanged(settings, state, facts, path)
    try:
        load_full_state(parts.model, parts.optimizer, state["model"], state["optimizer"])
        parts.scaler.load_state_dict(state["scaler"])
        if parts.ema is not None:
            parts.ema.load_state_dict(state["ema"])
        if team.rank < len(state["random"]):
            restore_random_state(state["random"][team.rank])
        kept = {key: state[key] for key in ("history", "step", "total", "seconds")}
        progress = Progress(**kept, saved=True, peak=state.get("peak"))
        if progress.history:
            best_epoch(progress.history)["epoch"]
    except Exception as error:  # whatever is in the file, the answer is one sentence
        raise CheckpointError(f"{path} does not fit this network: {' '.join(str(error).split())}") from error
    return progress


def take_over(settings: TrainSettings, parts: Parts, progress: Progress, team: Team) -> None:
    """Makes the folder that of a run that goes on, also of one that was in another folder or further."""
    if team.is_first:
        _adopt(settings, progress)
    if progress.history and progress.step == 0:
        _save_best(settings, parts, progress, team)  # a kill can come between checkpoint and weights


def _adopt(settings: TrainSettings, progress: Progress) -> None:
    """Copies what the run needs, if it was in another folder or further, and starts its log."""
    source = settings.checkpoint()
    if source.resolve() != (settings.out / "last.pt").resolve():
        copy_of(source, settings.out / "last.pt")
        if (
            source.parent.resolve() != settings.out.resolve()
            and (source.parent / "best.safetensors").exists()
        ):
            copy_of(source.parent / "best.safetensors", settings.out / "best.safetensors")
    _write_settings(settings)
    write_log(settings.out, progress)


def _check_unchanged(settings: TrainSettings, state: Mapping[str, Any], facts: Facts, path: Path) -> None:
    """Refuses what would give other weights than the uninterrupted run's."""
    now, then = settings.as_json(), TrainSettings().as_json() | state["settings"]
    free = {*FREE_ON_RESUME, *settings.allow_change}
    if settings.exact or settings.lossless:
        free |= {"memory", "save_activations"}  # the same numbers, to the bit
    if now["epochs"] < then["epochs"] and "epochs" not in free:
        raise ValueError(
            f"cannot resume {path}: --epochs was {then['epochs']} and may only grow, got {now['epochs']}"
        )
    changes = [(flag(key), key, then[key], now[key]) for key in now if key not in free | {"epochs"}]
    changes += [
        (key, key, state["facts"].get(key), facts[key]) for key in facts if key not in settings.allow_change
    ]
    for name, key, before, after in changes:
        if before != after:
            raise ValueError(
                f"cannot resume {path}: {name} was {before} and is now {after}, which gives other numbers; "
                f"--allow-change {key} goes on all the same"
            )


def write_log(folder: Path, progress: Progress) -> None:
    """The epochs so far, one a line."""
    write_text(folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in progress.history))


def copy_of(source: Path, target: Path) -> None:
    """Gives a file a second name, which the next checkpoint does not touch; a copy, where there are no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        write_atomically(target, lambda part: shutil.copyfile(source, part))


def _write_settings(settings: TrainSettings) -> None:
    write_text(settings.out / "settings.json", json.dumps(settings.as_json(), indent=2) + "\n")


def best_epoch(history: Sequence[Record]) -> Record:
    """The first of the epochs with the highest mIoU."""
    return max(history, key=lambda record: -1.0 if record["miou"] is None else record["miou"])
