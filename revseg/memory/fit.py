"""Any network fits: a copy of it that takes no more memory than there is, and gives the same numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from revseg.memory.apply import Part, as_it_was
from revseg.memory.budget import bytes_of
from revseg.memory.candidate import Candidate
from revseg.memory.estimate import Estimate
from revseg.memory.follow import Block, Follower
from revseg.memory.plan import MIB, Choice, Plan, choices
from revseg.memory.prediction import Prediction
from revseg.memory.segments import LARGE
from revseg.memory.step import Loss, Optimizer, Step
from revseg.memory.trace import AGAIN, Key, Tracer

_TRIES = 2  # of the lowest estimates
_SURE = 0.8  # estimates are no lower than this share of what is predicted then


def fit(
    model: nn.Module,
    example: Any,
    loss: Loss | None = None,
    budget: int | str | None = None,
    factor: float | None = None,
    time: float | None = None,
    *,
    optimizer: Optimizer | None = None,
    target: Any = None,
    autocast: torch.dtype | None = None,
    device: str | torch.device | None = None,
    bands: bool | None = None,
) -> nn.Module:
    """A copy of a network whose training step fits, without a change of its code or of its numbers.

    ```python
    model = fit(model, images, loss=criterion, budget="10GB")   # or factor=4, or time=1.25
    print(model.plan)
    loss = criterion(model(images), labels)                     # as before
    loss = model.loss(images, labels)                           # or so: the same, by bands if the plan says so
    ```

    Args:
        model: Any network. It is left as it was.
        example: What the network is called with, at the size of training; on the meta device it takes no memory.
        loss: As in `revseg.memory.predict`.
        budget: The most that a step may take, parameters, gradients and optimizer included: bytes, or text like
            "10GB" and "800MiB".
        factor: Instead: how many times less a step shall take than now, beyond what stands before it.
        time: Instead: the most time of a step, as a multiple of now; the least memory within it.
        optimizer: As in `revseg.memory.predict`; its state counts.
        target: What the loss compares with.
        autocast: The dtype to which autocast casts.
        device: Where the step will run.
        bands: Whether rows of convolutions, norms and activations may go by bands (`docs/bands.md`), exact but for the order
            of sums: True where that helps, False never, None if a budget cannot be met without.

    Returns:
        The copy, with the plan as `plan`. Its state dict has the names of the model's. `model.loss(images, labels)` is
        `loss(model(images), labels)`, by bands where the network ends in logits, upsampled or not, and the loss is a
        cross-entropy (`revseg.memory.late`). Where the plan counts on that it says so.

    Numerics: outputs and buffers are bitwise those of the model where kernels give the same result twice; running
        statistics count a batch once, dropout masks repeat. So are gradients, but for two sums that round otherwise:
        of a loss by bands, and of a map that is read twice inside of what runs again and outside of it too. Where rows
        go by bands outputs, buffers and gradients are those of the model up to rounding.

    Raises:
        ValueError: If not one of the three is given, or the budget is less than what can be reached: the error
            says how much that is.
        UnpredictableError: If the step depends on values.
    """
    if sum(each is not None for each in (budget, factor, time)) != 1:
        raise ValueError(f"expected one of budget, factor and time, got {budget=}, {factor=}, {time=}")
    search = Search(model, example, Step(loss, optimizer, True, target, autocast, device), bands)
    return search.plan(budget, factor, time).apply(model, loss)


class Search:
    """The search for plans of one network and one input. What it has found stays for the next question.

    Args:
        model: Any network. It is left as it was.
        example: What it is called with.
        step: What is trained.
        bands: See `fit`.

    Raises:
        TypeError: If the model is none.
    """

    def __init__(self, model: nn.Module, example: Any, step: Step, bands: bool | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        self.model, self.example, self.step = as_it_was(model), example, step
        self.bands = bands
        self.before = _predicted(self.model, example, step)
        self.least: Plan | None = None
        self._peaks: dict[tuple[bool, tuple[Part, ...]], int] = {(False, ()): self.before.peak}

    def plan(
        self, budget: int | str | None = None, factor: float | None = None, time: float | None = None
    ) -> Plan:
        """The plan for one of the three, as in `fit`.

        Raises:
            ValueError: If the budget is less than what can be reached.
        """
        if time is not None:
            return self.within_time(time)
        if factor is not None:
            return self.within_bytes(self.before.before + self.before.step_bytes / factor)
        assert budget is not None
        return self.within_bytes(bytes_of(budget))

    def within_bytes(self, budget: float) -> Plan:
        """The fastest that takes no more; the loss is by bands only where it must be.

        Raises:
            ValueError: If none is found.
        """
        if self.before.peak <= budget:
            return self._without()
        late = [False, True] if self._can_be_late() else [False]
        for bands in (False,) if self.bands is False else (False, True):
            for each in late:
                plan = self._fastest(each, budget, bands)
                if plan is not None:
                    return plan
        assert self.least is not None
        raise ValueError(
            f"expected a budget of at least {self.least.peak / MIB:,.1f} MiB for this network and this input, got "
            f"{budget / MIB:,.1f} MiB; a smaller batch or smaller images need less"
        )

    def within_time(self, time: float) -> Plan:
        """The one with the least memory that takes no longer."""
        late, plans = self._can_be_late(), []
        for bands in (False, True) if self.bands else (False,):
            found, _ = self._choices(late, bands)
            allowed = sorted((c for c in found if c.time <= time), key=lambda c: c.peak)[:_TRIES]
            plans += [self._plan(late, choice) for choice in allowed]
        return min([self._without(), *plans], key=lambda plan: (plan.peak, plan.time))

    def _fastest(self, late: bool, budget: float, bands: bool) -> Plan | None:
        found, standing = self._choices(late, bands)
        for choice in sorted(found, key=lambda c: (c.time, c.peak)):
            if _SURE * (choice.peak + standing) <= budget:
                plan = self._plan(late, choice)
                if plan.peak <= budget:
                    return plan
        for choice in sorted(found, key=lambda c: c.peak)[:_TRIES]:
            self._plan(late, choice)
        return None

    def _can_be_late(self) -> bool:
        """Whether the loss can be by bands, and logits are large enough for that to matter."""
        if self.step.loss is None or hasattr(self.model, "loss"):
            return False
        tracer, _ = self._trace(True)
        return bool(tracer.late) or tracer.whole_logits > self.before.step_bytes // LARGE

    @cache  # noqa: B019, what is held goes with the search
    def _trace(self, late: bool) -> tuple[Tracer, list[Block]]:
        return self._step(late).run(self.model, self.example, Tracer, Tracer.noting)

    @cache  # noqa: B019
    def _choices(self, late: bool, bands: bool) -> tuple[list[Choice], int]:
        """What could be chosen, and the bytes that stand before the step."""
        estimate = self._estimate(late)
        return choices(estimate, bands), estimate.standing

    @cache  # noqa: B019
    def _estimate(self, late: bool) -> Estimate:
        tracer, standing = self._trace(late)
        return Estimate(tracer, self.model, standing)

    def _step(self, late: bool) -> Step:
        """What is trained, with the loss by bands or not."""
        return replace(self.step, late=late)

    def _without(self) -> Plan:
        return Plan(type(self.model).__name__, (), self.before.peak, self.before.peak, 1.0)

    def _plan(self, late: bool, choice: Choice) -> Plan:
        """The plan of a choice, its peak predicted."""
        parts = tuple(_part(key, candidate) for key, candidate in choice.chosen.items())
        plan = replace(self._without(), parts=parts, time=choice.time, by_bands=late)
        if (late, parts) not in self._peaks:
            fitted = plan.apply(self.model)
            self._peaks[late, parts] = _predicted(fitted, self.example, self._step(late)).peak
        plan = replace(plan, peak=self._peaks[late, parts])
        if self.least is None or plan.peak < self.least.peak:
            self.least = plan
        return plan


def _part(key: Key, candidate: Candidate) -> Part:
    name, first, behind, how = key
    call = candidate.calls[0]
    compact = how == AGAIN and call.shared
    if first < 0:
        return Part(name, compact=compact)
    return Part(name, first, behind, call.members, how != AGAIN, call.takes, compact)


def _predicted(model: nn.Module, example: Any, step: Step) -> Prediction:
    follower, standing = step.run(model, example, Follower)
    return Prediction.of(model, standing, follower)
