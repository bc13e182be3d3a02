"""A layer as a stack sees it: a maker of raw maps, a batch norm, an activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg import ops
from revseg.engine.memo import remember
from revseg.engine.tracing import has_hooks
from revseg.layers.linear import Convolution, Maker


@dataclass(frozen=True)
class Layer:
    """What a module tells about itself.

    Args:
        maker: Makes the raw map.
        parameters: Of the maker; None for those it lacks.
        bn: Batch norm behind it.
        act: PReLU, LeakyReLU, ReLU or Identity behind that.
    """

    maker: Maker
    parameters: tuple[Tensor | None, ...]
    bn: nn.BatchNorm2d
    act: nn.Module

    def all_parameters(self) -> list[Tensor | None]:
        slope = self.act.weight if isinstance(self.act, nn.PReLU) else None
        return [*self.parameters, self.bn.weight, self.bn.bias, slope]

    def fixed_slope(self) -> float:
        if isinstance(self.act, nn.LeakyReLU):
            return float(self.act.negative_slope)
        return 0.0 if isinstance(self.act, nn.ReLU) else 1.0

    def uses_batch(self) -> bool:
        return self.bn.training or (self.bn.running_mean is None and self.bn.running_var is None)

    def dilation(self, x: Tensor) -> int | None:
        """That of an asymmetric convolution which runs as a kernel on the raw map before it, x; None if it does not."""
        maker, weight = self.maker, self.parameters[0]
        if not isinstance(maker, Convolution) or maker.asymmetric is None or weight is None:
            return None
        return maker.asymmetric if ops.has_asymmetric_conv(x, weight) else None

    def convolve(
        self, x: Tensor, norm: ops.Norm | None, weight: Tensor, dilation: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The raw map of such a layer, and its statistics, which are taken on the way if no run before has them."""
        made: list[Tensor] = []

        def statistics() -> tuple[Tensor, Tensor]:
            u, mean, var = ops.asymmetric_conv(x, norm, weight, dilation, self.uses_batch())
            made.append(u)
            return self.statistics(u, None if mean is None or var is None else (mean, var))

        found = remember(statistics)
        return made[0] if made else ops.asymmetric_conv(x, norm, weight, dilation, False)[0], found

    def statistics(self, u: Tensor, of_batch: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance to normalise by, those of the batch if they are known; running statistics are moved on."""
        bn = self.bn
        if not self.uses_batch():
            running: tuple[Any, Any] = bn.running_mean, bn.running_var
            mean, var = (each.to(torch.float64, copy=True) for each in running)  # training moves them on
            return mean, var
        F._verify_batch_size(u.size())  # type: ignore[attr-defined]
        mean, var = ops.batch_statistics(u) if of_batch is None else of_batch
        if bn.training and bn.running_mean is not None and bn.running_var is not None:
            values = u.numel() // u.shape[1]
            ops.move_statistics(
                bn.running_mean, bn.running_var, bn.num_batches_tracked, mean, var, values, bn.momentum
            )
        return mean, var


def layer_of(
    maker: Maker | None, parameters: tuple[Tensor | None, ...], bn: nn.Module, act: nn.Module
) -> Layer | None:
    """A layer of these parts; None if a stack does not know one of them."""
    known = type(bn) is nn.BatchNorm2d and type(act) in (nn.PReLU, nn.LeakyReLU, nn.ReLU, nn.Identity)
    if maker is None or not known or has_hooks(bn, act):
        return None
    return Layer(maker, parameters, bn, act)  # type: ignore[arg-type]
