"""Rows of layers by bands whose input is made as it is read: of smaller maps, of values in their corners.

Such a source is a `Whole` of which rows can be asked for; the gradient that is written to one of the same kind is that of
what it is made of. What autograd sees are the small maps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

from revseg.engine.gradients import Grads
from revseg.layers.bands.cut import Bands
from revseg.layers.bands.row import BandedRow
from revseg.layers.bands.rows import Asked, Images, Whole
from revseg.layers.bands.run import differentiable, memory_of
from revseg.layers.corner_pool import unpool
from revseg.layers.stack_layer import Layer


class Source(Whole):
    """A map that follows from its parts."""

    @abstractmethod
    def plain(self) -> Tensor:
        """The map as a whole, by ordinary autograd."""

    @abstractmethod
    def like(self) -> Whole:
        """Memory for the gradients of the parts."""


class Unpooled(Source):
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

    def plain(self) -> Tensor:
        return unpool(self.parts[0], self.corners, self.shape[2:])

    def like(self) -> Unpooled:
        return Unpooled(torch.empty_like(self.parts[0]), self.corners, self.shape[2:])

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


class WithGrids(Source):
    """A map, and beside it, as further channels, grids of a few cells at the map's size: bilinear, corners at corners.

    Args:
        x: The map [N, C, H, W].
        grids: Each [N, c, k, k].
    """

    def __init__(self, x: Tensor, *grids: Tensor) -> None:
        super().__init__(x, *grids)
        n, channels, height, width = x.shape
        self.shape = n, channels + sum(grid.shape[1] for grid in grids), height, width

    def plain(self) -> Tensor:
        x, *grids = self.parts
        size = x.shape[2:]
        return torch.cat(
            (x, *(F.interpolate(g, size, mode="bilinear", align_corners=True) for g in grids)), 1
        )

    def like(self) -> WithGrids:
        x, *grids = self.parts
        wide = (
            torch.zeros(g.shape, dtype=torch.promote_types(g.dtype, torch.float32), device=g.device)
            for g in grids
        )
        return WithGrids(torch.empty_like(x), *wide)

    def rows(self, images: Images, first: int, last: int, layout: torch.memory_format | None) -> Tensor:
        x, *grids = self.parts
        found = [x[images, :, first:last]]
        for grid in grids:
            down, across = self._weights(grid, x.dtype)
            found.append(down[first:last] @ (grid[images] @ across.mT))  # [n, c, rows, W]
        return torch.cat(found, 1).contiguous(memory_format=layout or torch.contiguous_format)

    def write(self, images: Images, first: int, band: Tensor) -> None:
        x, *grids = self.parts
        end, channels = first + band.shape[2], x.shape[1]
        x[images, :, first:end] = band[:, :channels]
        for grid in grids:
            down, across = self._weights(grid, grid.dtype)
            part = band[:, channels : channels + grid.shape[1]].to(grid.dtype)
            grid[images] += down[first:end].mT @ (part @ across)
            channels += grid.shape[1]

    def _weights(self, grid: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """How much of each cell of a side stands in each row and column of the map [H, k], [W, k]."""
        down, across = (
            _bilinear(grid.shape[d], self.shape[d]).to(device=grid.device, dtype=dtype) for d in (2, 3)
        )
        return down, across


def _bilinear(cells: int, length: int) -> Tensor:
    step = (cells - 1) / (length - 1) if length > 1 else 0.0
    distance = torch.arange(length, dtype=torch.float64)[:, None] * step - torch.arange(cells)
    return (1 - distance.abs()).clamp(min=0)


@_disable_dynamo
def run_of_source(
    layers: Sequence[Layer], make: Callable[..., Source], parts: Sequence[Tensor], bands: Bands
) -> Tensor:
    """What layers make of `make(*parts)`; keeps the parts.

    Args:
        layers: All local.
        make: Makes the source.
        parts: What gradients are asked for; `parts` of the source, in their order.
        bands: How maps are cut.
    """
    source = make(*parts)
    row = BandedRow(layers, source, bands)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*parts, *row.tensors)):
        return _OfSource.apply(row, make, len(parts), *parts, *row.tensors)  # type: ignore[no-any-return, no-untyped-call]
    return row.first_run(source, lambda: Whole(memory_of(row, parts[0]))).parts[0]


class _OfSource(torch.autograd.Function):
    boxed_grads_call = True  # where torch knows it, the incoming gradients are freed after their first use

    @staticmethod
    def forward(
        ctx: Any, row: BandedRow, make: Callable[..., Source], count: int, *tensors: Tensor
    ) -> Tensor:
        ctx.row, ctx.make, ctx.count = row, make, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return row.first_run(make(*tensors[:count]), lambda: Whole(memory_of(row, tensors[0]))).parts[0]

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, *box: Any) -> Any:
        dys: Grads = box[0] if isinstance(box[0], list) else list(box)
        row, make, count = ctx.row, ctx.make, ctx.count
        tensors = ctx.saved_tensors
        if dys[0] is None:
            return (None,) * (3 + len(tensors))
        wanted = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():

            def run(parts: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
                return row.rerun_with_graph(make(*parts).plain(), parameters)  # type: ignore[no-any-return]

            return None, None, None, *differentiable(run, count, tensors, dys, wanted)
        dz, dx = Whole(dys[0]), Asked(make(*tensors[:count]))
        dys.clear()
        of_input = any(wanted[:count])
        found = row.gradients(dx.x, tensors[count:], dz, wanted[count:], dx if of_input else None)
        given = [None if d is None else d.to(t.dtype) for d, t in zip(dx.gradients(), tensors, strict=False)]
        return None, None, None, *given, *found
