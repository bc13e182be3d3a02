"""A convolution that ends a network, by bands: one that nothing follows.

Of maps of a size that matters, a library's copies in layouts of its own take more than the classes that come out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from revseg.engine.gradients import Grads
from revseg.layers.bands.cut import Bands
from revseg.layers.bands.module import may_go_by_bands
from revseg.layers.bands.rows import Band, Images, Whole
from revseg.layers.bands.run import Map, differentiable, joined
from revseg.layers.convolution import Convolution
from revseg.layers.layer_input import lowered
from revseg.layers.linear import summed
from revseg.layers.recompute import Recompute
from revseg.replay.context import is_casting, without_autocast
from revseg.tensors import CHANNELS_LAST, dense


class HeadByBands(Recompute):
    """A convolution that goes by bands, forward and backward; its input may be two streams.

    The state dict is that of the convolution. Of one that is not local this is a `Recompute`.

    Args:
        conv: The convolution.
        bands: How maps are cut.
        save_activations: True for the plain twin.
    """

    def __init__(self, conv: nn.Module, bands: Bands, *, save_activations: bool = False) -> None:
        super().__init__(conv, save_activations=save_activations)
        self.bands = bands

    def forward(self, x: Map) -> Any:
        """The scores [N, C, h, ...] of a map [N, C, H, ...], or of its halves."""
        parts = (x,) if isinstance(x, Tensor) else tuple(x)
        op = Convolution.of(self.module) if may_go_by_bands(self, parts) else None
        if op is None or op.by_band is None or op.dims != parts[0].ndim - 2:
            return super().forward(joined(parts))
        conv: Any = self.module
        cast = torch.get_autocast_dtype(parts[0].device.type) if is_casting(parts[0].device.type) else None
        parameters = [lowered(p, cast) for p in (conv.weight, conv.bias) if p is not None]
        return _ByBands.apply(_Head(op, self.bands, cast), len(parts), *parts, *parameters)  # type: ignore[no-untyped-call]


class _Head:
    """What is fixed about one run."""

    def __init__(self, op: Convolution, bands: Bands, cast: torch.dtype | None) -> None:
        self.op, self.bands, self.cast = op, bands, cast

    def forward(self, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The output of the whole map."""
        return self.op.forward(lowered(x, self.cast), *parameters)

    def cuts(self, x: Whole, y: Sequence[int]) -> Iterator[tuple[Images, int, int]]:
        """Rows of the output, image by image."""
        window = self.op.window()
        assert window is not None
        images, channels, _, *across = x.shape
        values = max(channels * math.prod(across) * window.step, y[1] * math.prod(y[3:]))
        size = x.parts[0].element_size() * values
        rows = max(1, self.bands.bytes // max(1, size))
        for i in range(images):
            for first in range(0, y[2], rows):
                yield slice(i, i + 1), first, min(first + rows, y[2])

    def read(self, x: Whole, images: Images, first: int, last: int) -> Band:
        window = self.op.window()
        assert window is not None
        low, high = window.inside(first, last, x.shape[2])
        layout = CHANNELS_LAST.get(len(x.shape)) if x.parts[0].device.type == "cpu" else None
        return Band(lowered(x.rows(images, low, high, layout), self.cast), low, x.shape[2])


class _ByBands(torch.autograd.Function):
    boxed_grads_call = True  # where torch knows it, the incoming gradients are freed after their first use

    @staticmethod
    def forward(ctx: Any, head: _Head, count: int, *tensors: Tensor) -> Tensor:
        ctx.head, ctx.count = head, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        x, parameters = Whole(*tensors[:count]), tensors[count:]
        shape = head.op.shape(x.shape, parameters)
        y = tensors[0].new_empty(shape, dtype=parameters[0].dtype)
        with without_autocast(y.device.type):
            for images, first, last in head.cuts(x, shape):
                band = head.read(x, images, first, last)
                y[images, :, first:last] = head.op.make_band(band, first, last, parameters)
        return y

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, *box: Any) -> Any:
        (dy,) = box[0] if isinstance(box[0], list) else box
        head, count, tensors = ctx.head, ctx.count, ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if dy is None:
            return (None,) * (2 + len(tensors))
        if torch.is_grad_enabled():

            def run(parts: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
                return head.forward(joined(parts), parameters)  # type: ignore[no-any-return]

            return None, None, *differentiable(run, count, tensors, [dy], wanted)
        x, parameters = Whole(*tensors[:count]), tensors[count:]
        total: Grads = [None] * len(parameters)
        dx = x.like() if any(wanted[:count]) else None
        done = 0
        with without_autocast(dy.device.type):
            for images, first, last in head.cuts(x, dy.shape):
                band = head.read(x, images, first, last)
                rows = dense(dy[images, :, first:last])
                if any(wanted[count:]):
                    more = head.op.band_parameter_gradients(rows, band, first, parameters, wanted[count:])
                    total = summed(total, more)
                if dx is not None:
                    done = 0 if first == 0 else done
                    done = _write(head, dx, dy, band, (images, done, last), parameters)
        found = [None if t is None else t.to(p.dtype) for t, p in zip(total, parameters, strict=True)]
        return None, None, *(dx.parts if dx is not None else [None] * count), *found


def _write(
    head: _Head,
    dx: Whole,
    dy: Tensor,
    band: Band,
    where: tuple[Images, int, int],
    parameters: Sequence[Tensor],
) -> int:
    """The rows of the gradient of the input that rows of the output up to the last one complete; how many are done."""
    images, done, last = where
    window = head.op.window()
    assert window is not None
    end = band.height if last == dy.shape[2] else min(max(window.finished(last), done), band.height)
    if end > done:
        start, stop = window.readers(done, end, dy.shape[2])
        rows = Band(dense(dy[images, :, start:stop]), start, dy.shape[2])
        dx.write(images, done, head.op.band_input_gradient(rows, band, done, end, parameters))
    return end
