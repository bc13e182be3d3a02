"""The convolution that ends a network at the size of its images.

A transposed convolution of 2 x 2 with stride 2 makes four pixels of each, and none overlap. Over scores at full
size PyTorch's libraries take copies in layouts of their own, with channels filled up to 16 or 32: for 19
classes twice the scores, in both passes. A band of rows at a time, the copies are those of a band.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg import ops
from revseg.engine.gradients import Grads
from revseg.engine.tracing import is_traced
from revseg.layers.linear import summed
from revseg.replay.context import is_casting, without_autocast

BAND = 1 << 18  # values of the output


class DoublingConv2d(nn.ConvTranspose2d):
    """Twice the size: [N, in, H, W] to [N, out, 2 H, 2 W].

    Names and numbers are those of `nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)`. On a CPU large maps go
    through it by bands of rows; gradients of the weights are summed over these.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        bias: Whether there is one.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 2, stride=2, bias=bias)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        traced = torch.compiler.is_compiling() or is_traced([x])
        if traced or x.ndim != 4 or x.device.type != "cpu" or not ops.kernels_are_on():
            return super().forward(x, output_size)
        given = [x, self.weight, self.bias]
        if is_casting("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            given = [None if t is None else t.to(dtype) for t in given]
        rows = BAND // max(1, 4 * len(x) * self.out_channels * x.shape[3])
        if rows >= x.shape[2]:
            return super().forward(x, output_size)
        return _ByBands.apply(max(1, rows), *given)  # type: ignore[no-any-return, no-untyped-call]


class _ByBands(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x, weight, bias)
        n, _, h, w = x.shape
        y: Tensor | None = None
        with without_autocast("cpu"):
            for before, after in _bands(h, rows):
                part = F.conv_transpose2d(x[:, :, before], weight, bias, stride=2)
                if y is None:
                    last = part.is_contiguous(memory_format=torch.channels_last) and not part.is_contiguous()
                    layout = torch.channels_last if last else torch.contiguous_format
                    y = torch.empty(
                        n,
                        weight.shape[1],
                        2 * h,
                        2 * w,
                        dtype=part.dtype,
                        device=x.device,
                        memory_format=layout,
                    )
                y[:, :, after] = part
        assert y is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[1:])
        with without_autocast("cpu"):
            if torch.is_grad_enabled():  # to be differentiated once more
                return None, *_gradients(dy, x, weight, bias, wanted)
            dx = torch.empty_like(x) if wanted[0] else None
            total: Grads = [None, None]
            for before, after in _bands(x.shape[2], ctx.rows):
                part, *more = _gradients(dy[:, :, after], x[:, :, before], weight, bias, wanted)
                if dx is not None and part is not None:
                    dx[:, :, before] = part
                wide = [None if g is None else g.float() if g.element_size() < 4 else g for g in more]
                total = summed(total, wide)
        return None, dx, *(None if g is None else g.to(weight.dtype) for g in total)


def _gradients(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]) -> Grads:
    size = None if bias is None else list(bias.shape)
    mask = [*wanted[:2], wanted[2] and bias is not None]
    found = torch.ops.aten.convolution_backward(
        dy, x, weight, size, [2, 2], [0, 0], [1, 1], True, [0, 0], 1, mask
    )
    return list(found)


def _bands(height: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Rows of the input, and those that they become."""
    for first in range(0, height, rows):
        last = min(first + rows, height)
        yield slice(first, last), slice(2 * first, 2 * last)
