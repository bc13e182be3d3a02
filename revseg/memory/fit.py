"""Any network fits: a copy of it that takes no more memory than there is, and gives the same numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from revseg.memory.apply import Part, as_it_was
from revseg.memory.estimate import Estimate
from revseg.memory.follow import Follower
from revseg.memory.plan import MIB, Choice, Plan, choices
from revseg.memory.prediction import Prediction
from revseg.memory.step import Loss, Optimizer, Step
from revseg.memory.trace import Tracer

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
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
) -> nn.Module:
    """A copy of a network whose training step fits, without a change of its code or of its numbers.

    ```python
    model = fit(model, images, loss=criterion, budget="10GB")   # or factor=4, or time=1.25
    print(model.plan)
    loss = criterion(model(images), labels)                     # as before
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

    Returns:
        The copy, with the plan as `plan`. Its state dict has the names of the model's.

    Numerics: gradients are bitwise those of the model where kernels give the same result twice; running statistics
        count a batch once; dropout masks repeat.

    Raises:
        ValueError: If not one of the three is given, or the budget is less than what can be reached: the error
            says how much that is.
        UnpredictableError: If the step depends on values.
    """
    if sum(each is not None for each in (budget, factor, time)) != 1:
        raise ValueError(f"expected one of budget, factor and time, got {budget=}, {factor=}, {time=}")
    step = Step(loss, optimizer, True, target, autocast, device)
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    model = as_it_was(model)
    before = _predicted(model, example, step)
    wanted = None if budget is None else bytes_of(budget)
    if factor is not None:
        wanted = before.before + before.step_bytes / factor
    return plan_for(model, example, step, before.peak, wanted, time).apply(model)


def plan_for(
    model: nn.Module, example: Any, step: Step, before: int, budget: float | None, time: float | None
) -> Plan:
    """The plan of `fit`; `before` is the peak without one."""
    name = type(model).__name__
    if budget is not None and before <= budget:
        return Plan(name, (), before, before, 1.0)
    tracer, standing = step.run(model, example, Tracer, Tracer.noting)
    estimate = Estimate(tracer, model, standing)
    found = choices(estimate)
    plans: list[Plan] = []
    if budget is None:
        assert time is not None
        allowed = sorted((c for c in found if c.time <= time), key=lambda c: c.peak)[:_TRIES]
        plans = [_plan(model, example, step, before, choice) for choice in allowed]
        return min([Plan(name, (), before, before, 1.0), *plans], key=lambda plan: (plan.peak, plan.time))
    for choice in sorted(found, key=lambda c: (c.time, c.peak)):
        if _SURE * (choice.peak + estimate.standing) <= budget:
            plans.append(_plan(model, example, step, before, choice))
            if plans[-1].peak <= budget:
                return plans[-1]
    lowest = sorted(found, key=lambda c: c.peak)[:_TRIES]
    least = min(plan.peak for plan in [*plans, *(_plan(model, example, step, before, c) for c in lowest)])
    raise ValueError(
        f"expected a budget of at least {least / MIB:,.1f} MiB for this network and this input, got "
        f"{budget / MIB:,.1f} MiB; a smaller batch or smaller images need less"
    )


def bytes_of(budget: int | str | None) -> float:
    """A number of bytes, from text like "10GB".

    Raises:
        ValueError: If it is none.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(budget))
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"expected a budget like 10GB or 800MiB, got {budget!r}")
    return float(found[1]) * _UNITS[found[2].upper()]


def _plan(model: nn.Module, example: Any, step: Step, before: int, choice: Choice) -> Plan:
    """The plan of a choice, its peak predicted."""
    parts = tuple(Part(*(key if key[1] >= 0 else key[:1])) for key in choice.chosen)
    plan = Plan(type(model).__name__, parts, before, before, choice.time)
    return replace(plan, peak=_predicted(plan.apply(model), example, step).peak) if parts else plan


def _predicted(model: nn.Module, example: Any, step: Step) -> Prediction:
    follower, standing = step.run(model, example, Follower)
    return Prediction.of(model, standing, follower)
