"""An epoch of training, and of validation."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from revseg.data import EpochSampler
from revseg.losses import OhemCrossEntropy, UpsampleCrossEntropy
from revseg.metrics import ConfusionMatrix
from revseg.ops import upsample_cross_entropy
from revseg.training.distributed import Team, is_sharded, without_reduction
from revseg.training.folder import DivergedError, Parts, Progress
from revseg.training.optimize import learning_rate
from revseg.training.random_state import seed_epoch
from revseg.training.settings import TrainSettings
from revseg.training.setup import Batch, autocast
from revseg.training.step_memory import counted
from revseg.training.stop import Stop


def train_epoch(
    parts: Parts,
    criterion: UpsampleCrossEntropy,
    batches: DataLoader[Batch],
    settings: TrainSettings,
    progress: Progress,
    *,
    save: Callable[[], None],
    show: Callable[[float], None] = lambda loss: None,
    stop: Stop | None = None,
    team: Team | None = None,
) -> float:
    """The mean loss of an epoch, in which the model sees every batch once.

    Args:
        parts: The network and what moves it.
        criterion: The loss.
        batches: The training samples.
        settings: Of the run.
        progress: How far the run has come; moved on with each step.
        save: Called between two steps when a checkpoint is due.
        show: Called with the loss after each step.
        stop: Whether a signal came.
        team: The processes of the run; this one alone by default.

    Raises:
        DivergedError: If the loss is not finite; that step is not made.
        StoppedError: If a signal came, after the checkpoint.
    """
    stop, team = stop or Stop(), team or Team()
    parts.model.train()
    steps = steps_of(batches, settings)
    first = True
    started, saved = time.monotonic() - progress.seconds, time.monotonic()
    with ended(from_step(batches, settings, progress, team)) as source:
        while progress.step < steps:
            with stop.later():
                done = progress.epoch * steps + progress.step
                for group in parts.optimizer.param_groups:
                    group["lr"] = learning_rate(settings, done, steps * settings.epochs)
                some = next_batches(source, settings.accumulate, stop)
                if some:
                    make = partial(gradients, parts, criterion, some, settings, team)
                    value = team.mean(make() if first else counted(make, parts, progress, some))
                    first = False
                    if not math.isfinite(value):
                        raise DivergedError(divergence("loss", value, batches, settings, progress))
                    make_step(parts, settings)
                    progress.step, progress.total = progress.step + 1, progress.total + value
                    progress.seconds = time.monotonic() - started
                    show(value)
                late = time.monotonic() - saved > 60 * settings.save_minutes
                late |= settings.save_steps is not None and (done + 1) % settings.save_steps == 0
                signal, due = team.highest(stop.number, late)
                if signal or due:
                    save()
                    saved = time.monotonic()
            if signal:
                stop.number = signal
                raise stop.error(
                    f"saved at epoch {progress.epoch + 1}, step {progress.step}: --resume goes on from there"
                )
    return progress.total / steps


def gradients(
    parts: Parts, criterion: UpsampleCrossEntropy, some: Sequence[Batch], settings: TrainSettings, team: Team
) -> float:
    """The loss of a step, whose gradients are added up over its batches."""
    device = next(parts.model.parameters()).device
    parts.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    for i, (images, labels) in enumerate(some):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with without_reduction(parts.model, i + 1 == len(some)):
            with autocast(settings, device):
                loss = criterion(parts.model(images), labels) / len(some)
            if team.size > 1:
                loss = loss * share_of_loss(criterion, labels, team)
            parts.scaler.scale(loss).backward()
        total += loss.detach()
        del loss  # else its graph would live through the next forward pass
    return float(total)


def make_step(parts: Parts, settings: TrainSettings) -> None:
    """Moves the weights by their gradients, and the averaged weights after them."""
    if settings.clip is not None:
        parts.scaler.unscale_(parts.optimizer)
        nn.utils.clip_grad_norm_(parts.model.parameters(), settings.clip)
    parts.scaler.step(parts.optimizer)
    parts.scaler.update()
    if parts.ema is not None:
        parts.ema.update_parameters(parts.model)


def share_of_loss(criterion: UpsampleCrossEntropy, labels: Tensor, team: Team) -> Tensor | float:
    """What the mean over the pixels here counts in the mean over the pixels of all processes, times their number.

    Hard pixels are chosen by each process for itself, so with OHEM each process counts alike.
    """
    if isinstance(criterion, OhemCrossEntropy):
        return 1.0
    counts = torch.bincount(labels.flatten(), minlength=256).double()
    counts[criterion.ignore_index] = 0
    if criterion.weight is not None:
        counts = counts[: len(criterion.weight)] * criterion.weight
    here = counts.sum()
    return here * team.size / team.add_up(here.clone()).clamp(min=torch.finfo(torch.float64).tiny)


@torch.no_grad()
def validate(
    model: nn.Module,
    batches: DataLoader[Batch],
    num_classes: int,
    device: torch.device,
    team: Team | None = None,
) -> tuple[ConfusionMatrix, float]:
    """Counts of the pixels of all batches, and the mean over images of the unweighted loss, of all processes."""
    team = team or Team()
    model.eval()
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    total, count = 0.0, 0
    with closing(of_every_process(batches, model, team)) as source:
        for images, labels, counts_here in source:
            logits, labels = model(images.to(device)), labels.to(device)
            if not counts_here:
                continue
            for scores, label in zip(logits.split(1), labels.split(1), strict=True):  # type: ignore[no-untyped-call]
                total, count = total + float(upsample_cross_entropy(scores, label, counts=counts)), count + 1
    matrix = ConfusionMatrix(num_classes)
    matrix.add(team.add_up(counts))
    total, images_seen = team.sums(total, count)
    return matrix, total / images_seen


def of_every_process(
    batches: DataLoader[Batch], model: nn.Module, team: Team
) -> Generator[tuple[Tensor, Tensor, bool]]:
    """The batches; if parameters are sharded, the last again and uncounted until the others have theirs, too."""
    images = labels = None
    with ended(iter(batches)) as source:
        for images, labels in source:
            yield images, labels, True
    if is_sharded(model) and images is not None and labels is not None:
        for _ in range(team.highest(len(batches))[0] - len(batches)):
            yield images, labels, False


def steps_of(batches: DataLoader[Batch], settings: TrainSettings) -> int:
    """Steps of the optimizer in an epoch."""
    sampler = batches.sampler
    assert isinstance(sampler, EpochSampler)
    each = sampler.length // sampler.world
    return max(1, each // settings.batch) // settings.accumulate


def from_step(
    batches: DataLoader[Batch], settings: TrainSettings, progress: Progress, team: Team
) -> Iterator[Batch]:
    """The batches of an epoch that are still to come."""
    sampler, dataset = batches.sampler, batches.dataset
    sampler.set_epoch(progress.epoch, progress.step * settings.accumulate * settings.batch * team.size)  # type: ignore[attr-defined]
    dataset.set_epoch(progress.epoch)  # type: ignore[attr-defined]
    seed_epoch(batches, settings.seed, progress.epoch)
    return iter(batches)


def first_batch(batches: DataLoader[Batch]) -> Batch:
    """The first batch of the first epoch."""
    batches.sampler.set_epoch(0)  # type: ignore[attr-defined]
    with ended(iter(batches)) as source:
        images, labels = next(source)
    return images, labels


@contextmanager
def ended(source: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """Batches whose loading processes end with the context.

    They leave signals to this process, also the one by which Python ends its children: while a traceback keeps the
    iterator, Python would wait for them when it exits.
    """
    try:
        yield source
    finally:
        if hasattr(
            source, "_shutdown_workers"
        ):  # that of several processes; torch does the same when it is freed
            source._shutdown_workers()


def next_batches(source: Iterator[Batch], count: int, stop: Stop) -> list[Batch]:
    """The batches of a step; none, if the processes that load them were stopped by the signal that stops us."""
    try:
        return [next(source) for _ in range(count)]
    except RuntimeError as error:
        if stop.number and "DataLoader worker" in str(error):
            return []
        raise


def divergence(
    what: str, value: float, batches: DataLoader[Batch] | None, settings: TrainSettings, progress: Progress
) -> str:
    """The message of a `DivergedError`: where, on which files, and what is left of the run."""
    place = f"epoch {progress.epoch + 1}"
    if batches is not None:
        sampler, names = batches.sampler, batches.dataset.names  # type: ignore[attr-defined]
        size = settings.accumulate * settings.batch * sampler.world  # type: ignore[attr-defined]
        order = sampler.order()[progress.step * size :][:size]  # type: ignore[attr-defined]
        place = f"step {progress.step + 1} of {place}, samples {', '.join(names[i] for i in order)}"
    kept = (
        f"{settings.out / 'last.pt'} holds the run before" if progress.saved else "there is no checkpoint yet"
    )
    return f"the {what} became {value} at {place}; {kept}"
