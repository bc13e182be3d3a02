"""Rows of layers by bands that end in a max pool: the map at full size is never whole.

The pool takes the maxima of bands as they are made, and the gradient of the map is that of its maxima, in their corners
(`revseg.layers.corner_pool`, `revseg.layers.bands.sources`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from revseg.engine.gradients import Grads
from revseg.layers.bands.cut import Bands
from revseg.layers.bands.row import BandedRow
from revseg.layers.bands.rows import Asked, Images, Whole
from revseg.layers.bands.run import differentiable
from revseg.layers.bands.sources import Unpooled
from revseg.layers.corner_pool import pool_with_corners
from revseg.layers.stack_layer import Layer


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
        dys: Grads = box[0] if isinstance(box[0], list) else list(box)
        row: BandedRow = ctx.row
        corners, *tensors = ctx.saved_tensors
        if dys[0] is None:
            return (None,) * (1 + len(tensors))
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():

            def run(parts: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
                return pool_with_corners(row.rerun_with_graph(parts[0], parameters))[0]

            return None, *differentiable(run, 1, tensors, dys[:1], wanted)
        dz = Unpooled(dys[0], corners, row.plan.shapes[-1][2:])
        dys.clear()
        dx = Asked(Whole(tensors[0]))
        found = row.gradients(dx.x, tensors[1:], dz, wanted[1:], dx if wanted[0] else None)
        return None, *dx.gradients(), *found
