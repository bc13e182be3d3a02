"""How parameters move: the optimizer and what decays in it, the learning rate of a step, the averaged weights."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from revseg.training.settings import TrainSettings


def create_optimizer(settings: TrainSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the settings, over all parameters that are trained."""
    groups: Sequence[dict[str, Any]] = decay_groups(model, settings.weight_decay, settings.decay == "all")
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, settings.lr, momentum=settings.momentum)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, settings.lr, betas=settings.betas)


def decay_groups(model: nn.Module, weight_decay: float, everything: bool = False) -> list[dict[str, Any]]:
    """The parameters in two groups: those that decay, and norms, biases and slopes of activations.

    A weight of a convolution or a linear layer has more than one dimension, none of the others has.

    Args:
        model: The network.
        weight_decay: Of the first group.
        everything: All parameters decay.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decaying = [p for p in parameters if everything or p.ndim > 1]
    others = [p for p in parameters if not (everything or p.ndim > 1)]
    groups = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """The learning rate of a step.

    Args:
        settings: Say the schedule.
        step: How many steps of the optimizer the run has made.
        steps: How many it will have made at its end.
    """
    if step < settings.warmup:
        return settings.lr * (step + 1) / (settings.warmup + 1)
    share = (step - settings.warmup) / max(1, steps - settings.warmup)
    if settings.schedule == "poly":
        return settings.lr * float((1 - share) ** settings.power)
    if settings.schedule == "cosine":
        return settings.lr * (1 + math.cos(math.pi * share)) / 2
    return settings.lr


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the network whose weights and running statistics follow it, each step a little."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]
