"""Max pools of 2 x 2 that tell in which corner each maximum was, and the way back.

A corner is a byte where PyTorch's indices take eight, and putting values back into their corners is
deterministic, as PyTorch's own unpooling is not. A square at an odd border has what there is of it, so a side of
n pixels becomes ceil(n / 2).

In an export for any size everything is said by indices that follow from the size, as arithmetic: the graph then
holds for odd and for even sides, where a slice or a padding would fix what the example had.

Source: Badrinarayanan, Kendall and Cipolla, SegNet, arXiv:1511.00561, section 3.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg.engine.tracing import is_traced
from revseg.layers.images import crop, is_size_open
from revseg.tensors import is_plain


def pool_with_corners(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each 2 x 2 square, and in which corner it was.

    Args:
        x: A map [N, C, H, W].

    Returns:
        The maxima [N, C, ceil(H / 2), ceil(W / 2)], and their corners 0 to 3, row by row, uint8; of equal
        values the first.
    """
    if is_size_open(x):
        return _open_pool(x)
    if _is_ordinary(x):
        pooled, corners = _Pool.apply(x)  # type: ignore[no-untyped-call]
        return pooled, corners
    return _pool(x)


def _pool(x: Tensor) -> tuple[Tensor, Tensor]:
    pooled, indices = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
    width = x.shape[-1]
    rows, columns = (indices // width % 2).byte(), (indices % width % 2).byte()
    return pooled, 2 * rows + columns


def unpool(x: Tensor, corners: Tensor, size: Sequence[int]) -> Tensor:
    """Each value in its corner of a square, zeros elsewhere.

    Args:
        x: Values [N, C, h, w].
        corners: As from `pool_with_corners`, of the same shape.
        size: H and W, each twice as many as h and w, or one less.

    Returns:
        The map [N, C, H, W].
    """
    if is_size_open(x):
        return _open_unpool(x, corners, size)
    if _is_ordinary(x):
        return _Unpool.apply(x, corners, tuple(size))  # type: ignore[no-any-return, no-untyped-call]
    places = torch.arange(4, dtype=torch.uint8, device=x.device).view(4, 1, 1)
    squares = torch.where(corners.unsqueeze(2) == places, x.unsqueeze(2), 0.0)  # [N, C, 4, h, w]
    return crop(F.pixel_shuffle(squares.flatten(1, 2), 2), size)


def _is_ordinary(x: Tensor) -> bool:
    """Whether nobody looks at what happens inside: then a pool keeps the corners alone, and indices exist of a few rows."""
    return (
        x.ndim == 4
        and x.numel() > 0
        and is_plain(x)
        and not torch.compiler.is_compiling()
        and not is_traced([x])
    )


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        n, channels, *size = x.shape
        shape = (n, channels, *((length + 1) // 2 for length in size))
        layout = _layout_of(x)
        pooled = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        corners = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=layout)
        rows = 2 * max(1, _BAND // (2 * channels * size[1]))
        for i in range(n):
            for first in range(0, size[0], rows):
                band = slice(first // 2, (first + rows) // 2)
                pooled[i : i + 1, :, band], corners[i : i + 1, :, band] = _pool(
                    x[i : i + 1, :, first : first + rows]
                )
        ctx.mark_non_differentiable(corners)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(corners)
        ctx.size = tuple(size)
        return pooled, corners

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> Any:
        (corners,) = ctx.saved_tensors
        return None if dy is None else _Unpool.apply(dy, corners, ctx.size)  # type: ignore[no-untyped-call]


class _Unpool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(corners)
        y = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=_layout_of(x))
        for corner, squares in _squares(y):
            for k, part in enumerate(squares):
                here = slice(k, k + 1), slice(None), slice(part.shape[2]), slice(part.shape[3])
                part.copy_(torch.where(corners[here] == corner, x[here], 0))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _Picked.apply(dy, *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]


class _Picked(torch.autograd.Function):
    """What stands in the corners."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, corners: Tensor) -> Tensor:
        ctx.save_for_backward(corners)
        ctx.size = tuple(y.shape[2:])
        x = torch.zeros(corners.shape, dtype=y.dtype, device=y.device).contiguous(memory_format=_layout_of(y))
        for corner, squares in _squares(y):
            for k, part in enumerate(squares):
                here = slice(k, k + 1), slice(None), slice(part.shape[2]), slice(part.shape[3])
                x[here] = torch.where(corners[here] == corner, part, x[here])
        return x

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        return _Unpool.apply(dx, *ctx.saved_tensors, ctx.size), None  # type: ignore[no-untyped-call]


def _squares(y: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Each corner, and the pixels of all squares that are there, image by image [1, C, h, w]."""
    for corner in range(4):
        yield corner, torch.split(y[:, :, corner // 2 :: 2, corner % 2 :: 2], 1)


def _layout_of(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


_BAND = 1 << 18  # values of the rows that are pooled at a time


def _open_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    height, width = x.shape[-2:]
    firsts = [2 * torch.arange((length + 1) // 2, device=x.device) for length in (height, width)]
    rows, columns = (
        (first, (first + 1).clamp(max=length - 1))
        for first, length in zip(firsts, (height, width), strict=True)
    )  # the last square of an odd side has its only row or column twice
    four = [x.index_select(-2, row).index_select(-1, column) for row in rows for column in columns]
    pooled = torch.maximum(torch.maximum(four[0], four[1]), torch.maximum(four[2], four[3]))
    corner = torch.full_like(pooled, 3, dtype=torch.uint8)
    for i in (2, 1, 0):
        corner = torch.where(four[i] == pooled, torch.full_like(corner, i), corner)
    return pooled, corner


def _open_unpool(x: Tensor, corners: Tensor, size: Sequence[int]) -> Tensor:
    rows, columns = (torch.arange(length, device=x.device) for length in size)

    def enlarged(each: Tensor) -> Tensor:
        return each.index_select(-2, rows // 2).index_select(-1, columns // 2)

    here = (rows % 2 * 2)[:, None] + columns % 2  # [H, W]
    return torch.where(enlarged(corners.int()) == here, enlarged(x), 0.0)
