"""A short training of small functions, for the tests of modules with state."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from revseg import AdditiveCoupling, OneSidedCoupling, ReversibleSequence
from tests.helpers import Result, run_step, small_input


def sequence_of(make: Callable[[], nn.Module], **options: Any) -> ReversibleSequence:
    """An additive and a one-sided block of functions of four channels, always the same."""
    torch.manual_seed(0)
    return ReversibleSequence(AdditiveCoupling(make(), make()), OneSidedCoupling(make()), **options).double()


def conv_and(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *layers)


def train(net: nn.Module, steps: int = 3) -> Result:
    """A few steps of SGD on different inputs; the results of the last."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for seed in range(steps):
        result = run_step(net, small_input(seed=seed))
        optimizer.step()
    return result
