"""A convolution of a band of a map, and its gradients.

A band is cut out with the rows that it reads beyond its own, zeros where these lie outside of the map, so that no row is
computed in vain. The gradient of the input is a convolution with the turned kernel where the stride is 1. Per value
the sums are those of the whole map; on a CPU, in channels_last, so are the bits. The gradient of the weight is a sum over
bands, in float32 also where maps are in half precision.

A CPU runs one small volume in float32 by other means than several, or a large one: slower (five times and more), with other bits,
and with a copy for each place of the kernel. A band of one goes as two of half of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from revseg.engine.gradients import Grads
from revseg.layers.bands.rows import Band, pad_rows
from revseg.layers.bands.window import Window
from revseg.tensors import CHANNELS_LAST


@dataclass(frozen=True)
class BandConvolution:
    """What is fixed about it; the first number of each is that of rows.

    Args:
        kernel: Its size.
        stride: Step between windows.
        padding: Zeros around the map.
        dilation: Distance between taps.
        groups: Of channels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def window(self) -> Window:
        return self._windows()[0]

    def size(self, size: Sequence[int]) -> tuple[int, ...]:
        """What comes of a map of this size, rows first."""
        return tuple(w.height(length) for w, length in zip(self._windows(), size, strict=True))

    def _windows(self) -> list[Window]:
        """Of all dimensions."""
        return Window.of(self.kernel, self.stride, self.padding, self.dilation)

    def make(self, x: Band, first: int, last: int, parameters: Sequence[Tensor]) -> Tensor:
        """Rows first to last (excluded) of the output."""
        return self._convolved(*_read(x, *self.window.read(first, last)), *parameters)

    def of_parameters(
        self, du: Tensor, x: Band, first: int, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        """What rows of the output's gradient, from `first` on, add to the gradients of weight and bias."""
        rows, rim = _read(x, *self.window.read(first, first + du.shape[2]))
        if du.device.type == "cpu":
            du, rows, parameters = _wide(du), _wide(rows), [_wide(p) for p in parameters]
        found = self._backward(du, rows, rim, parameters, [False, *wanted])[1 : len(parameters) + 1]
        return [None if g is None else _wide(g) for g in found]

    def of_input(
        self, du: Band, across: Sequence[int], first: int, last: int, parameters: Sequence[Tensor]
    ) -> Tensor:
        """Rows first to last (excluded) of the input's gradient, of a map of this size across its rows."""
        weight, windows = parameters[0], self._windows()
        reach, _, above, _ = windows[0]
        turned = [w.reach - 1 - w.above for w in windows[1:]]  # the padding of the way back
        if set(self.stride) == {1} and all(p >= 0 for p in turned):
            rows, rim = _read(du, first + above - reach + 1, last + above)
            back = replace(self, padding=(0, *turned))
            return back._convolved(rows, rim, self._turned(weight))
        start, stop = self.window.readers(first, last, du.height)
        channels = weight.shape[1] * self.groups
        n = len(du.values)
        if stop <= start:
            return du.values.new_zeros(n, channels, last - first, *across)
        low, high = self.window.read(start, stop)
        like = du.values.new_empty(n, channels, high - low, *across)
        if du.values.device.type == "cpu" and like.ndim in CHANNELS_LAST:
            like = like.contiguous(memory_format=CHANNELS_LAST[like.ndim])
        dx: Tensor = self._backward(du.rows(start, stop), like, 0, parameters, [True, False, False])[0]
        return pad_rows(dx, 0, max(0, last - high))[:, :, first - low : last - low]

    def _turned(self, weight: Tensor) -> Tensor:
        """The kernel that takes gradients back: turned around, inputs and outputs exchanged."""
        outputs, inputs, *size = weight.shape
        grouped = weight.reshape(self.groups, outputs // self.groups, inputs, *size)
        exchanged = grouped.transpose(1, 2).reshape(-1, outputs // self.groups, *size)
        return exchanged.flip(*range(2, weight.ndim))

    def _convolved(self, x: Tensor, rim: int, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Of rows that are all there, but for so many of zeros above and below."""
        x = self._readable(x)
        if not self._goes_as_two(x, weight):
            u = torch.convolution(x, weight, bias, *self._numbers(rim))
            volume = u.ndim == 5 and u.device.type == "cpu"  # of which some are made contiguous nevertheless
            return u.contiguous(memory_format=torch.channels_last_3d) if volume else u
        rows = (x.shape[2] - self.window.reach) // self.window.step + 1
        u = torch.convolution(self._as_two(x, rows), weight, bias, *self._numbers())
        joined = u.movedim(1, -1).flatten(0, 1)[None].movedim(-1, 1)  # in channels_last_3d a view
        return joined[:, :, :rows]

    def _backward(
        self, du: Tensor, x: Tensor, rim: int, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Any:
        weight, rows, height, x = parameters[0], du.shape[2], x.shape[2], self._readable(x)
        bias = [len(weight)] if len(parameters) > 1 else None
        mask = (*wanted[:2], bias is not None and wanted[2])
        halves = self._goes_as_two(x, weight)
        if halves:
            x = self._as_two(x, rows)
            du = torch.unflatten(pad_rows(du, 0, rows % 2)[0], 1, (2, -1)).transpose(0, 1)
        dx, *found = torch.ops.aten.convolution_backward(du, x, weight, bias, *self._numbers(rim), mask)
        if halves and dx is not None:
            first, second = dx.split(1)
            start = du.shape[2] * self.window.step  # of the rows of the second
            dx = pad_rows(first, 0, start)
            dx[:, :, start:] += second
            dx = dx[:, :, :height]
        return dx, *found

    def _numbers(self, rim: int = 0) -> tuple[Any, ...]:
        """As operations take them, for bands with all of their rows but so many of zeros on both sides."""
        none = [0] * len(self.kernel)
        return self.stride, [rim, *self.padding[1:]], self.dilation, False, none, self.groups

    def _readable(self, x: Tensor) -> Tensor:
        """The band, contiguous if it has a single channel and one column comes of it.

        A CPU reads beyond the memory of such a map in channels_last where the stride is more than 1 (torch 2.13).
        """
        alone = x.ndim > 3 and x.shape[1] == 1 and self._windows()[-1].height(x.shape[-1]) == 1
        return x[:, 0][:, None] if alone else x

    def _goes_as_two(self, x: Tensor, weight: Tensor) -> bool:
        """Whether a library would run this volume by other means, as it is alone."""
        if x.ndim != 5 or len(x) > 1 or x.device.type != "cpu" or math.prod(self.kernel) == 1:
            return False
        alone, two = (
            torch._C._select_conv_backend(each, weight, None, *self._numbers())
            for each in (x, x.expand(2, *x.shape[1:]))
        )
        return bool(alone != two)

    def _as_two(self, x: Tensor, rows: int) -> Tensor:
        """What each half of so many rows of the output reads, and zeros where there is one more."""
        each = -(-rows // 2)
        low, count = each * self.window.step, (each - 1) * self.window.step + self.window.reach
        x = pad_rows(x, 0, max(0, low + count - x.shape[2]))
        return torch.cat((x[:, :, :count], x[:, :, low : low + count]))


def _read(x: Band, low: int, high: int) -> tuple[Tensor, int]:
    """Rows of a map, and how many of zeros above and below are left to the convolution: where as many are wanted of both.

    Of volumes none are, as it depends on their rows how they run.
    """
    rim = -low if x.values.ndim < 5 and 0 < -low == high - x.height else 0
    return x.padded(low + rim, high - rim), rim


def _wide(x: Tensor) -> Tensor:
    """In float32, if it was in half precision."""
    return x.float() if x.element_size() < 4 else x
