"""Functions that amplify, and the couplings to amplify in."""

import pytest
import torch
from torch import nn

from revseg import (
    AdditiveCoupling,
    AffineCoupling,
    OneSidedCoupling,
)

couplings = pytest.mark.parametrize("coupling", [AdditiveCoupling, OneSidedCoupling, AffineCoupling])


class Scale(nn.Module):
    """h = factor * x, the factor a parameter."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x):
        return self.factor * x
