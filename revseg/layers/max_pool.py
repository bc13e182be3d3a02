"""A max pool as a layer of a row that goes by bands: nothing follows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg.engine.gradients import Grads
from revseg.engine.tracing import has_hooks
from revseg.layers.bands.window import Window
from revseg.layers.layer_input import LayerInput
from revseg.layers.linear import LinearOp

_POOLS: dict[type[nn.Module], int] = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
_FUNCTIONS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class MaxPool(LinearOp):
    """The largest values of windows; only `of` knows which pools it can be.

    Args:
        kernel: Size of a window.
        stride: Step between windows.
        padding: Rows and columns around the map, which are no maximum.
        dims: Of the map.
    """

    def __init__(self, kernel: int, stride: int, padding: int, dims: int = 2) -> None:
        self.kernel, self.stride, self.padding, self.dims = kernel, stride, padding, dims

    @classmethod
    def of(cls, module: nn.Module) -> MaxPool | None:
        """The op of this module; None if it is no pool of windows of equal sides with their maxima alone."""
        if type(module) not in _POOLS or has_hooks(module):
            return None
        pool: Any = module
        numbers = pool.kernel_size, pool.stride, pool.padding
        plain = pool.dilation == 1 and not pool.return_indices and not pool.ceil_mode
        if not plain or not all(isinstance(number, int) for number in numbers):
            return None
        return cls(*numbers, _POOLS[type(pool)])

    def window(self) -> Window:
        above = -(-self.padding // self.stride) * self.stride  # so that a band begins at a row of its own
        return Window(above - self.padding + self.kernel, self.stride, above, self.padding)

    def shape(self, x: Sequence[int], parameters: Sequence[Tensor]) -> tuple[int, ...]:
        n, channels, *size = x
        return n, channels, *((s + 2 * self.padding - self.kernel) // self.stride + 1 for s in size)

    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return _FUNCTIONS[self.dims](x, self.kernel, self.stride, self.padding)

    def make(self, x: LayerInput, parameters: Sequence[Tensor]) -> Tensor:
        return self.forward(x.values())

    def backward(
        self, du: Tensor, x: LayerInput, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        if not wanted[0]:
            return [None]
        with torch.enable_grad():
            values = x.values().detach().requires_grad_()
            pooled = self.forward(values)
        return [torch.autograd.grad(pooled, values, du)[0]]
