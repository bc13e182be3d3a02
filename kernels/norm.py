"""What turns a raw map into an activated one: the statistics of a batch norm, its parameters, and an activation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from revseg.kernels.precision import widest


@dataclass(frozen=True)
class Norm:
    """What turns a raw map into an activated one; all vectors are [C], and are not changed while it is in use.

    Attributes:
        mean: Mean by channel, float64 where the device has it, of the batch or running.
        var: Variance by channel, of the same dtype, biased.
        weight: Of batch norm; None for 1.
        bias: Of batch norm; None for 0.
        slope: Of the activation below 0: PReLU's weight, [C] or [1]; a number for a constant; 1.0 for none.
        eps: Added to the variance.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    slope: Tensor | float
    eps: float

    @cached_property
    def inverse_deviation(self) -> Tensor:
        return (self.var + self.eps).rsqrt()

    @cached_property
    def vectors(self) -> Tensor:
        """Mean, scale, bias and slope of each channel [4, C], float64 where the device has it."""
        scale = self.inverse_deviation
        if self.weight is not None:
            scale = scale * self.weight
        bias = torch.zeros_like(self.mean) if self.bias is None else self.bias
        if isinstance(self.slope, Tensor):
            slope = self.slope.expand(self.mean.shape)
        else:
            slope = torch.full_like(self.mean, self.slope)
        return torch.stack([v.to(widest(self.mean.device)) for v in (self.mean, scale, bias, slope)])
