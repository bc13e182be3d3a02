"""Rows of layers between max pools and their ways back, by bands: the map at full size is never whole.

Behind a row of the encoder a pool takes the maxima of its bands as they are made; in front of one of the decoder bands are
made of the maxima and the corners in which they were (`revseg.layers.corner_pool`). Each is the way back of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from revseg.layers.bands.cut import Bands
from revseg.layers.bands.row import BandedRow
from revseg.layers.bands.rows import Images, Whole
from revseg.layers.bands.run import differentiable, memory_of
from revseg.layers.corner_pool import pool_with_corners, unpool
from revseg.layers.stack_layer import Layer


class Unpooled(Whole):
    """The map of values in their corners, zeros elsewhere; what is written to it is picked from there.

    Args:
        x: Values [N, C, h, w].
        corners: Of each, uint8.
        size: H and W of the map.
    """

    def __init__(self, x: Tensor, corners: Tensor, size: Sequence[int]) -> None:
        super().__init__(x)
        self.corners = corners
        self.shape = x.shape[0], x.shape[1], size[0], size[1]

    def rows(self, images: Images, first: int, last: int, layout: torch.memory_format | None) -> Tensor:
        low, high = first // 2, (last + 1) // 2
        count = min(2 * high, self.shape[2]) - 2 * low
        here = images, slice(None), slice(low, high)
        band = unpool(self.parts[0][here], self.corners[here], (count, self.shape[3]))
        rows = band[:, :, first - 2 * low : last - 2 * low]
        return rows.contiguous(memory_format=layout or torch.contiguous_format)

    def write(self, images: Images, first: int, band: Tensor) -> None:
        for corner in range(4):
            down, across = divmod(corner, 2)
            start = (first + down) % 2
            part = band[:, :, start::2, across::2]
            low, (_, _, count, width) = (first + start) // 2, part.shape
            here = images, slice(None), slice(low, low + count), slice(width)
            x = self.parts[0][here]
            x.copy_(torch.where(self.corners[here] == corner, part, x))


class Maxima(Whole):
    """Takes a map band by band, and keeps the maxima of 2 x 2 squares and their corners.

    Args:
        maxima: Memory for them [N, C, h, w].
        corners: The same, uint8.
        size: H and W of the map.
    """

    def __init__(self, maxima: Tensor, corners: Tensor, size: Sequence[int]) -> None:
        super().__init__(maxima, corners)
        self.shape = maxima.shape[0], maxima.shape[1], size[0], size[1]
        self.waiting: Tensor | None = None  # a row without the one below it

    def write(self, images: Images, first: int, band: Tensor) -> None:
        if self.waiting is not None:
            band, first = torch.cat((self.waiting, band), 2), first - 1
            self.waiting = None
        count = band.shape[2]
        if count % 2 and first + count < self.shape[2]:
            count -= 1
            self.waiting = band[:, :, count:].clone()
        if count:
            here = images, slice(None), slice(first // 2, (first + count + 1) // 2)
            for whole, part in zip(self.parts, pool_with_corners(band[:, :, :count]), strict=True):
                whole[here] = part


@_disable_dynamo
def pooled_by_bands(layers: Sequence[Layer], x: Tensor, bands: Bands) -> tuple[Tensor, Tensor]:
    """The maxima of what layers make of x, and their corners, as `pool_with_corners` gives them; keeps x and the corners.

    Args:
        layers: All local.
        x: Their input [N, C, H, W].
        bands: How maps are cut.
    """
    row = BandedRow(layers, Whole(x), bands)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *row.tensors)):
        return _Pooled.apply(row, x, *row.tensors)  # type: ignore[no-any-return, no-untyped-call]
    return _pooled(row, x)


@_disable_dynamo
def unpooled_by_bands(
    layers: Sequence[Layer], x: Tensor, corners: Tensor, size: Sequence[int], bands: Bands
) -> Tensor:
    """What layers make of `unpool(x, corners, size)`; keeps x and the corners.

    Args:
        layers: All local.
        x: Values [N, C, h, w].
        corners: Of each.
        size: H and W of the map.
        bands: How maps are cut.
    """
    source = Unpooled(x, corners, size)
    row = BandedRow(layers, source, bands)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *row.tensors)):
        return _OfUnpooled.apply(row, tuple(size), corners, x, *row.tensors)  # type: ignore[no-any-return, no-untyped-call]
    return row.first_run(source, lambda: Whole(memory_of(row, x))).parts[0]


def _pooled(row: BandedRow, x: Tensor) -> tuple[Tensor, Tensor]:
    n, channels, *size = row.plan.shapes[-1]
    shape = n, channels, *((length + 1) // 2 for length in size)
    layout = row.plan.layout or torch.contiguous_format

    def make_y() -> Whole:
        maxima, corners = (
            torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
            for dtype in (row.plan.dtype, torch.uint8)
        )
        return Maxima(maxima, corners, size)

    maxima, corners = row.first_run(Whole(x), make_y).parts
    return maxima, corners


class _Pooled(torch.autograd.Function):
    boxed_grads_call = True  # where torch knows it, the incoming gradients are freed after their first use

    @staticmethod
    def forward(ctx: Any, row: BandedRow, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.row = row
        ctx.set_materialize_grads(False)
        maxima, corners = _pooled(row, x)
        ctx.mark_non_differentiable(corners)
        ctx.save_for_backward(corners, x, *tensors)
        return maxima, corners

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, *box: Any) -> Any:
        dys = list(box[0] if isinstance(box[0], list) else box)
        row: BandedRow = ctx.row
        corners, *tensors = ctx.saved_tensors
        if dys[0] is None:
            return (None,) * (1 + len(tensors))
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():

            def run(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
                return pool_with_corners(row.rerun_with_graph(x, parameters))[0]

            return None, *differentiable(run, 1, tensors, dys[:1], wanted)
        dz = Unpooled(dys[0], corners, row.plan.shapes[-1][2:])
        dys.clear()
        return None, *_gradients(row, tensors, Whole(tensors[0]), dz, wanted, Whole)


class _OfUnpooled(torch.autograd.Function):
    boxed_grads_call = True

    @staticmethod
    def forward(
        ctx: Any, row: BandedRow, size: tuple[int, int], corners: Tensor, x: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.row, ctx.size = row, size
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(corners, x, *tensors)
        return row.first_run(Unpooled(x, corners, size), lambda: Whole(memory_of(row, x))).parts[0]

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, *box: Any) -> Any:
        dys = list(box[0] if isinstance(box[0], list) else box)
        row, size = ctx.row, ctx.size
        corners, *tensors = ctx.saved_tensors
        if dys[0] is None:
            return (None,) * (3 + len(tensors))
        wanted = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():

            def run(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
                return row.rerun_with_graph(unpool(x, corners, size), parameters)  # type: ignore[no-any-return]

            return None, None, None, *differentiable(run, 1, tensors, dys, wanted)
        dz = Whole(dys[0])
        dys.clear()

        def unpooled(dx: Tensor) -> Unpooled:
            return Unpooled(dx, corners, size)

        source = Unpooled(tensors[0], corners, size)
        return None, None, None, *_gradients(row, tensors, source, dz, wanted, unpooled)


def _gradients(
    row: BandedRow, tensors: Sequence[Tensor], source: Whole, dz: Whole, wanted: Sequence[bool], given: Any
) -> Sequence[Tensor | None]:
    """Of the input, into what `given` makes of memory like it, and of the parameters."""
    dx: list[Tensor] = []

    def make_dx() -> Whole:
        dx.append(torch.empty_like(tensors[0]))
        return given(dx[0])  # type: ignore[no-any-return]

    found = row.gradients(source, tensors[1:], dz, wanted[1:], make_dx if wanted[0] else None)
    return [dx[0] if dx else None, *found]
