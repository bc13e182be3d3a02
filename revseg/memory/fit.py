"""Any network fits: a copy of it that takes no more memory than there is, and gives the same numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from revseg.convert.network import chains_of, with_chains
from revseg.memory.apply import Part, apply_parts, as_it_was
from revseg.memory.budget import bytes_of
from revseg.memory.candidate import Candidate
from revseg.memory.estimate import Estimate
from revseg.memory.follow import Block, Follower
from revseg.memory.late import arguments
from revseg.memory.plan import MIB, Choice, Plan, choices
from revseg.memory.prediction import Prediction
from revseg.memory.segments import LARGE
from revseg.memory.step import Loss, Optimizer, Step
from revseg.memory.trace import AGAIN, Key, Tracer

_TRIES, _MOST_TRIES = 2, 6  # of the lowest estimates; so many where predictions are not near them
_NEAR = 1.02
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
    reversible: bool = False,
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
        reversible: Whether rows of residual blocks may become reversible chains, where that serves what was asked for: another
            architecture of the same blocks, to be trained, with other names in its state dict (`revseg.reversible`). To
            find them the network runs on the example; of one on the meta device on one random input of its size.

    Returns:
        The copy, with the plan as `plan`. Its state dict has the names of the model's, but those of chains. `model.loss(images, labels)` is
        `loss(model(images), labels)`, by bands where the network ends in logits, upsampled or not, and the loss is a
        cross-entropy (`revseg.memory.late`). Where the plan counts on that it says so.

    Numerics: without chains outputs and buffers are bitwise those of the model where kernels give the same result twice; running
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
    step = Step(loss, optimizer, True, target, autocast, device)
    search = Search(model, example, step, bands, reversible=reversible)
    return search.plan(budget, factor, time).apply(model, loss)


class Search:
    """The search for plans of one network and one input. What it has found stays for the next question.

    Args:
        model: Any network. It is left as it was.
        example: What it is called with.
        step: What is trained.
        bands: See `fit`.
        reversible: See `fit`.

    Raises:
        TypeError: If the model is none.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        step: Step,
        bands: bool | None = None,
        *,
        reversible: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        self.model, self.example, self.step = as_it_was(model), example, step
        self.bands = bands
        self.before = _predicted(self.model, example, step)
        self.least: Plan | None = None
        self._peaks: dict[tuple[bool, tuple[Part, ...]], int] = {(False, ()): self.before.peak}
        self.nothing = Plan(type(self.model).__name__, (), self.before.peak, self.before.peak, 1.0)
        self.reversible = self._of_chains() if reversible else None

    def _of_chains(self) -> Search | None:
        """The search among plans of the network with chains; None if it has no row of residual blocks."""
        chains = chains_of(self.model, _one_input(self.example))
        if not chains:
            return None
        search = Search(with_chains(self.model, chains), self.example, self.step, self.bands)
        time = search._estimate(False).seconds / self._estimate(False).seconds
        search.nothing = replace(self.nothing, peak=search.before.peak, time=time, chains=chains)
        return search

    def plan(
        self, budget: int | str | None = None, factor: float | None = None, time: float | None = None
    ) -> Plan:
        """The plan for one of the three, as in `fit`.

        Raises:
            ValueError: If the budget is less than what can be reached.
        """
        searches = [self] if self.reversible is None else [self, self.reversible]
        if time is not None:
            found = [plan for s in searches if (plan := s.within_time(time)) is not None]
            return min(found, key=_by_peak, default=self.nothing)
        if factor is not None:
            budget_bytes = self.before.before + self.before.step_bytes / factor
        else:
            assert budget is not None
            budget_bytes = bytes_of(budget)
        plans = [plan for s in searches if (plan := s.within_bytes(budget_bytes)) is not None]
        if plans:
            return min(plans, key=lambda plan: (plan.time, plan.peak))
        least = min(s.least.peak for s in searches if s.least is not None)
        raise ValueError(
            f"expected a budget of at least {least / MIB:,.1f} MiB for this network and this input, got "
            f"{budget_bytes / MIB:,.1f} MiB; a smaller batch or smaller images need less"
        )

    def within_bytes(self, budget: float) -> Plan | None:
        """The fastest that takes no more; the loss is by bands only where it must be. None if none is found."""
        if self.before.peak <= budget:
            return self.nothing
        late = [False, True] if self._can_be_late() else [False]
        for bands in (False,) if self.bands is False else (False, True):
            for each in late:
                plan = self._fastest(each, budget, bands)
                if plan is not None:
                    return plan
        return None

    def within_time(self, time: float) -> Plan | None:
        """The one with the least memory that takes no longer; None if all take longer."""
        late, plans = self._can_be_late(), [self.nothing] if self.nothing.time <= time else []
        for bands in (False, True) if self.bands else (False,):
            found, standing = self._choices(late, bands)
            allowed = sorted((c for c in found if c.time * self.nothing.time <= time), key=lambda c: c.peak)
            for tries, choice in enumerate(allowed[:_MOST_TRIES]):
                near = _NEAR * (choice.peak + standing)
                if tries >= _TRIES and min(plan.peak for plan in plans) <= near:
                    break
                plans.append(self._plan(late, choice))
        return min(plans, key=_by_peak, default=None)

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

    def _plan(self, late: bool, choice: Choice) -> Plan:
        """The plan of a choice, its peak predicted."""
        parts = tuple(_part(key, candidate) for key, candidate in choice.chosen.items())
        plan = replace(self.nothing, parts=parts, time=choice.time * self.nothing.time, by_bands=late)
        if (late, parts) not in self._peaks:
            fitted = apply_parts(self.model, parts)
            self._peaks[late, parts] = _predicted(fitted, self.example, self._step(late)).peak
        plan = replace(plan, peak=self._peaks[late, parts])
        if self.least is None or plan.peak < self.least.peak:
            self.least = plan
        return plan


def _by_peak(plan: Plan) -> tuple[int, float]:
    return plan.peak, plan.time


def _one_input(example: Any) -> tuple[Any, ...]:
    """The arguments of a network's call, with values: of those without, random ones of one sample."""
    args, kwargs = arguments(example)
    if kwargs:
        raise ValueError("expected an example of positional arguments with reversible=True, got a dictionary")
    return tuple(tree_map_only(Tensor, _with_values, args))


def _with_values(x: Tensor) -> Tensor:
    if not x.is_meta:
        return x
    one = x[:1] if x.ndim else x
    make = torch.randn_like if x.is_floating_point() else torch.zeros_like
    return make(one, device="cpu")


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
