"""A run of training, in one straight line: settings, data, model, optimizer, loop, results.

summary = train(TrainSettings(data="camvid", root="CamVid", epochs=40, out="runs/camvid"))
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader

from revseg.data import SegmentationDataset
from revseg.files import finite_or_none
from revseg.losses import UpsampleCrossEntropy
from revseg.memory.room import free_bytes, is_memory_error
from revseg.training.distributed import Team, joined, local_rank
from revseg.training.dry_run import predicted_peak, show_plan
from revseg.training.folder import (
    DivergedError,
    Parts,
    Progress,
    Record,
    read_run,
    restore_run,
    save_epoch,
    save_run,
    take_over,
)
from revseg.training.lock import locked
from revseg.training.log import loggers
from revseg.training.loop import divergence, first_batch, steps_of, train_epoch, validate
from revseg.training.random_state import seed_everything
from revseg.training.report import epoch_line, step_progress
from revseg.training.results import check_libraries, count_parameters, draw_predictions, write_results
from revseg.training.settings import TrainSettings
from revseg.training.setup import (
    Batch,
    build_model,
    check_data,
    check_fit,
    choose_device,
    class_weights,
    create_criterion,
    create_loader,
    create_parts,
    create_split,
    facts_of,
)
from revseg.training.step_memory import MemoryExhaustedError, advice, level_within
from revseg.training.stop import Stop, watched_signals
from revseg.training.weights import described, load_starting_weights


class LoaderError(RuntimeError):
    """A process that loads samples has died."""


def train(settings: TrainSettings, console: Console | None = None) -> dict[str, Any]:
    """Trains a network and writes all that is known about it into `settings.out`.

    Args:
        settings: What the flags of `revseg train` say.
        console: Where to print; the standard output by default.

    Returns:
        The summary that is also in `summary.json`; with `dry_run` the plan.

    Raises:
        ValueError: If a setting, a folder, a file of the data set or a checkpoint is unfit.
        OSError: If a file cannot be read or written; the last checkpoint stays.
        DivergedError: If the loss stops being finite; the last checkpoint stays.
        MemoryExhaustedError: If a step does not fit; the message says what would.
        LoaderError: If a process that loads samples has died.
        StoppedError: If a signal came; what was done is saved.
    """
    settings.check_folders()
    check_libraries(settings)
    device = choose_device(settings.device, local_rank())
    with watched_signals() as stop, joined(device) as team:
        console = console or Console(highlight=False, markup=False)
        console.quiet |= not team.is_first
        return _train(settings, device, team, stop, console)


def _train(
    settings: TrainSettings, device: torch.device, team: Team, stop: Stop, console: Console
) -> dict[str, Any]:
    """The run in one of its processes; what it holds is gone before they part, as torch wants it."""
    writes, exists = team.is_first and not settings.dry_run, settings.out.exists()
    with ExitStack() as stack:
        if writes and exists:
            stack.enter_context(locked(settings.out))
        run = prepare(settings, device, team, console)
        if settings.dry_run:
            return show_plan(run.settings, run.steps, run.peak, run.size, device, team, console)
        if writes and not exists:  # nothing is made before everything is checked
            settings.out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(settings.out))
            settings.check_folders()
        return finish(run, stop, console)


@dataclass
class Run:
    """What a run is made of.

    Attributes:
        settings: What it was told.
        device: Where it computes.
        team: Its processes.
        batches: The training samples.
        val_batches: The validation samples.
        parts: The network, and what moves it.
        criterion: The loss.
        progress: How far it has come.
        facts: What else its numbers depend on.
        steps: Of the optimizer, in an epoch.
        peak: Predicted bytes of a step, if they can be predicted.
    """

    settings: TrainSettings
    device: torch.device
    team: Team
    batches: DataLoader[Batch]
    val_batches: DataLoader[Batch]
    parts: Parts
    criterion: UpsampleCrossEntropy
    progress: Progress
    facts: dict[str, object]
    steps: int
    peak: int | None

    @property
    def train_set(self) -> SegmentationDataset:
        """The training samples one by one."""
        return self.batches.dataset  # type: ignore[return-value]

    @property
    def val_set(self) -> SegmentationDataset:
        """The validation samples one by one."""
        return self.val_batches.dataset  # type: ignore[return-value]

    @property
    def size(self) -> Sequence[int]:
        """(H, W) of a training sample."""
        return self.train_set[0][1].shape

    def save(self) -> None:
        """Writes the checkpoint."""
        save_run(self.settings, self.facts, self.parts, self.progress, self.team)


def prepare(settings: TrainSettings, device: torch.device, team: Team, console: Console) -> Run:
    """Data, network, optimizer and loss of the settings; of a run that goes on, as they were."""
    state = read_run(settings) if settings.resume else None
    threads = settings.threads or (state and state["facts"].get("threads"))
    if threads:
        torch.set_num_threads(threads)
    seed_everything(settings.seed)

    train_set, val_set = create_split(settings, "train", augment=True), create_split(settings, "val")
    check_fit(settings, train_set, team.size)
    check_data(train_set, val_set)
    names, size = train_set.classes.names, train_set[0][1].shape
    batches = create_loader(train_set, settings, shuffle=True, team=team)
    val_batches = create_loader(val_set, settings, shuffle=False, team=team)
    if settings.budget is not None:
        memory = state and state["settings"]["memory"]
        settings = replace(settings, memory=memory) if memory else level_within(settings, len(names), size)

    model = build_model(settings, len(names), save_activations=settings.save_activations).to(device)
    if settings.weights is not None and state is None:
        left_out = load_starting_weights(model, settings.weights, names)
        console.print(f"starts from {settings.weights}, all but {', '.join(left_out) or 'nothing'}")
    description = described(settings, model, train_set.classes, size)
    parts = create_parts(settings, model, team, device, description)
    facts = facts_of(train_set, val_set, device, team)
    progress = Progress() if state is None else restore_run(settings, state, facts, parts, team)
    weight = None if settings.class_weights == "none" else class_weights(train_set, settings.class_weights)
    criterion = create_criterion(settings, weight).to(device)

    parameters = count_parameters(model)
    console.print(f"{settings.model}: {parameters:,} parameters, {len(names)} classes, on {device}")
    console.print(f"{settings.data}: {len(train_set)} samples for training, {len(val_set)} for validation")
    peak = predicted_peak(settings, len(names), size, console)
    steps = steps_of(batches, settings)
    return Run(settings, device, team, batches, val_batches, parts, criterion, progress, facts, steps, peak)


def finish(run: Run, stop: Stop, console: Console) -> dict[str, Any]:
    """Trains to the last epoch, and writes the results."""
    settings, progress, parts, team, device = run.settings, run.progress, run.parts, run.team, run.device
    names = run.train_set.classes.names
    if settings.resume:
        take_over(settings, parts, progress, team)
    with explained(settings, len(names), run.size, device), loggers(settings, progress, team) as log:
        while progress.epoch < settings.epochs:
            title = f"epoch {progress.epoch + 1}/{settings.epochs}"
            with step_progress(console, title, run.steps, progress.step) as show:
                loss = train_epoch(
                    parts,
                    run.criterion,
                    run.batches,
                    settings,
                    progress,
                    save=run.save,
                    show=show,
                    stop=stop,
                    team=team,
                )
            run.save()  # a broken sample in the validation must not cost the epoch
            matrix, val_loss = validate(parts.to_validate(), run.val_batches, len(names), device, team)
            if not math.isfinite(val_loss):
                raise DivergedError(divergence("validation loss", val_loss, None, settings, progress))
            record: Record = {
                "epoch": progress.epoch + 1,
                "loss": loss,
                "val_loss": val_loss,
                "lr": parts.optimizer.param_groups[0]["lr"],
                "miou": finite_or_none(matrix.mean_iou()),
                "pixel_accuracy": finite_or_none(matrix.pixel_accuracy()),
                "iou": dict(zip(names, map(finite_or_none, matrix.iou().tolist()), strict=True)),
                "seconds": round(progress.seconds, 3),
                "predicted_peak_bytes": run.peak,
                "peak_bytes": progress.peak,
            }
            progress.finish_epoch(record)
            run.save()
            save_epoch(settings, parts, progress, team)
            if team.is_first:
                log(record)
                if settings.pictures and progress.epoch % settings.pictures == 0:
                    name = f"samples-{progress.epoch:04}.png"
                    draw_predictions(settings, name, parts.to_validate(), run.val_set, device)
            console.print(epoch_line(record, settings.epochs))
        if not team.is_first:
            return {}
        batch = first_batch(run.batches)
    return write_results(settings, progress, run.criterion, batch, run.val_set, device, console)


@contextmanager
def explained(
    settings: TrainSettings, num_classes: int, size: Sequence[int], device: torch.device
) -> Iterator[None]:
    """Says what to do where memory ran out, or a process that loads samples has died.

    Raises:
        MemoryExhaustedError: In the place of an error of an allocator.
        LoaderError: In the place of that of a loader.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_memory_error(error):
            error.__traceback__ = None  # its frames hold the tensors that did not fit
            raise MemoryExhaustedError(
                f"out of memory on {device}: " + advice(settings, num_classes, size, free_bytes(device))
            ) from None
        if "DataLoader worker" in str(error):
            raise LoaderError(
                "a process that loads samples has died, perhaps for want of memory: fewer --workers take less; "
                "--resume goes on from the last checkpoint"
            ) from None
        raise
