"""A convolution of a band of a map, and its gradients.

A band is cut out with the rows that it reads beyond its own, zeros where these lie outside of the map, so that no row is
computed in vain. The gradient of the input is a convolution with the turned kernel where the stride is 1. Per value
the sums are those of the whole map; on a CPU, in channels_last, so are the bits. The gradient of the weight is a sum over
bands, in float32 also where maps are in half precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg.engine.gradients import Grads
from revseg.layers.bands.rows import Band
from revseg.layers.bands.window import Window


@dataclass(frozen=True)
class BandConvolution:
    """What is fixed about it; numbers are (down, across).

    Args:
        kernel: Its size.
        stride: Step between windows.
        padding: Zeros around the map.
        dilation: Distance between taps.
        groups: Of channels.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def window(self) -> Window:
        reach = self.dilation[0] * (self.kernel[0] - 1) + 1
        return Window(reach, self.stride[0], self.padding[0], self.padding[0])

    def width(self, width: int) -> int:
        reach = self.dilation[1] * (self.kernel[1] - 1) + 1
        return (width + 2 * self.padding[1] - reach) // self.stride[1] + 1

    def make(self, x: Band, first: int, last: int, parameters: Sequence[Tensor]) -> Tensor:
        """Rows first to last (excluded) of the output."""
        padded = x.padded(*self.window.read(first, last))
        bias = parameters[1] if len(parameters) > 1 else None
        across = (0, self.padding[1])
        return F.conv2d(padded, parameters[0], bias, self.stride, across, self.dilation, self.groups)

    def of_parameters(
        self, du: Tensor, x: Band, first: int, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        """What rows of the output's gradient, from `first` on, add to the gradients of weight and bias."""
        padded = x.padded(*self.window.read(first, first + du.shape[2]))
        if du.device.type == "cpu":
            du, padded, parameters = _wide(du), _wide(padded), [_wide(p) for p in parameters]
        found = self._backward(du, padded, parameters, [False, *wanted])[1 : len(parameters) + 1]
        return [None if g is None else _wide(g) for g in found]

    def of_input(self, du: Band, width: int, first: int, last: int, parameters: Sequence[Tensor]) -> Tensor:
        """Rows first to last (excluded) of the input's gradient, of a map of this width."""
        weight = parameters[0]
        reach, _, above, _ = self.window
        across = self.dilation[1] * (self.kernel[1] - 1) - self.padding[1]
        if self.stride == (1, 1) and across >= 0:
            padded = du.padded(first + above - reach + 1, last + above)
            return F.conv2d(padded, self._turned(weight), None, 1, (0, across), self.dilation, self.groups)
        start, stop = self.window.readers(first, last, du.height)
        channels = weight.shape[1] * self.groups
        n = du.values.shape[0]
        if stop <= start:
            return du.values.new_zeros(n, channels, last - first, width)
        low, high = self.window.read(start, stop)
        like = du.values.new_empty(n, channels, high - low, width)
        if du.values.device.type == "cpu":
            like = like.contiguous(memory_format=torch.channels_last)
        dx: Tensor = self._backward(du.rows(start, stop), like, parameters, [True, False, False])[0]
        return F.pad(dx, (0, 0, 0, max(0, last - high)))[:, :, first - low : last - low]

    def _turned(self, weight: Tensor) -> Tensor:
        """The kernel that takes gradients back: turned around, inputs and outputs exchanged."""
        outputs, inputs, *size = weight.shape
        grouped = weight.reshape(self.groups, outputs // self.groups, inputs, *size)
        return grouped.transpose(1, 2).reshape(-1, outputs // self.groups, *size).flip(2, 3)

    def _backward(self, du: Tensor, x: Tensor, parameters: Sequence[Tensor], wanted: Sequence[bool]) -> Any:
        bias = [len(parameters[0])] if len(parameters) > 1 else None
        mask = (*wanted[:2], bias is not None and wanted[2])
        return torch.ops.aten.convolution_backward(
            du,
            x,
            parameters[0],
            bias,
            self.stride,
            [0, self.padding[1]],
            self.dilation,
            False,
            [0, 0],
            self.groups,
            mask,
        )


def _wide(x: Tensor) -> Tensor:
    """In float32, if it was in half precision."""
    return x.float() if x.element_size() < 4 else x
