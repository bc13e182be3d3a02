"""What pools, resizing, sums, norms and softmax on a CPU copy: maps that lie otherwise than they are walked, and wider numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revseg.memory.inside import Workspace, copies, lies_by_pixels, order_of

_aten = torch.ops.aten
_SMALL_MAP = (
    128  # height and width of a result, together, up to which pixels are resized with all of their channels
)


def _pool(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Workspace:
    """A part of a larger map is copied first."""
    return _beside(copies(order_of(args[0]), args[0]))


def _gradient(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Workspace:
    """All maps are walked in the order of the gradient that arrives."""
    return _beside(copies(order_of(args[0]), args[0], result))


def _max_pool_backward(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Workspace:
    return _beside(copies(order_of(args[0]), args[0], result, args[7]))


def _bilinear(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Workspace:
    """Images of three channels go by pixels at any size."""
    return _resize(args[0], result, args[0].shape[1] == 3)


def _nearest(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Workspace:
    return _resize(args[0], result, False)


def _resize(x: Tensor, result: Tensor, image: bool) -> Workspace:
    """By pixels, all channels of one at a time, maps are copied that do not lie so."""
    by_pixels = x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 3
    if image or by_pixels or sum(result.shape[-2:]) <= _SMALL_MAP:
        return _beside(copies(torch.channels_last, x, result))
    return _beside(0)


def _resize_backward(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Workspace:
    """By pixels only if the gradient that arrives is a whole map."""
    whole = lies_by_pixels(args[0]) and args[0].is_contiguous(memory_format=torch.channels_last)
    return _beside(copies(torch.channels_last if whole else torch.contiguous_format, args[0], result))


def _mean(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Workspace:
    """In half precision of a copy in float32, and so is its result at first."""
    x = args[0]
    return _beside(4 * (x.numel() + result.numel()) if x.element_size() == 2 else 0)


def _sum(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Workspace:
    """In the dtype of the result; in half precision over dimensions that are no single one in memory, in float32."""
    x = args[0]
    if x.dtype != result.dtype:
        return _beside(x.numel() * result.element_size())
    dims = args[1] if len(args) > 1 and args[1] else range(x.ndim)
    if x.element_size() == 2 and x.is_floating_point() and _runs(x, {dim % x.ndim for dim in dims}) > 1:
        return _beside(4 * (x.numel() + result.numel()))
    return _beside(0)


def _runs(x: Tensor, dims: set[int]) -> int:
    """How many dimensions the summed ones are in memory, those joined that follow one another without a gap."""
    runs, last = 0, -1
    for dim in sorted((d for d in range(x.ndim) if x.shape[d] > 1), key=x.stride):
        if dim in dims:
            follows = last in dims and x.stride(dim) == x.stride(last) * x.shape[last]
            runs += not follows
        last = dim
    return runs


def _contiguous(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Workspace:
    return _beside(copies(torch.contiguous_format, args[0]))


def _softmax_backward(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Workspace:
    return _beside(copies(torch.contiguous_format, *args[:2]))


def _norm_backward(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Workspace:
    """Of two maps that lie alike the gradient is asked for twice, and the first one goes."""
    dy, x = args[:2]
    if not args[9][0]:
        return _beside(0)
    last_of_dy, last_of_x = lies_by_pixels(dy), lies_by_pixels(x)
    part = not last_of_dy and not dy.is_contiguous()
    if x.element_size() == 2 and (part if x.is_contiguous() else last_of_x and dy.is_contiguous()):
        return Workspace(0, 2 * x.nbytes)  # in float32
    alike = (last_of_dy and last_of_x) or (dy.is_contiguous() and x.is_contiguous())
    return Workspace(0, x.nbytes if alike else 0)


def _beside(size: int) -> Workspace:
    return Workspace(0, size, size)


PASSES: dict[Any, Callable[[tuple[Any, ...], dict[str, Any], Any], Workspace]] = {
    _aten.max_pool2d_with_indices.default: _pool,
    _aten.avg_pool2d.default: _pool,
    _aten._adaptive_avg_pool2d.default: _pool,
    _aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    _aten.avg_pool2d_backward.default: _gradient,
    _aten._adaptive_avg_pool2d_backward.default: _gradient,
    _aten.upsample_bilinear2d.default: _bilinear,
    _aten.upsample_nearest2d.default: _nearest,
    _aten.upsample_bilinear2d_backward.default: _resize_backward,
    _aten.upsample_nearest2d_backward.default: _resize_backward,
    _aten.mean.default: _mean,
    _aten.mean.dim: _mean,
    _aten.sum.default: _sum,
    _aten.sum.dim_IntList: _sum,
    _aten.aminmax.default: _contiguous,
    _aten._log_softmax.default: _contiguous,
    _aten._softmax.default: _contiguous,
    _aten._log_softmax_backward_data.default: _softmax_backward,
    _aten._softmax_backward_data.default: _softmax_backward,
    _aten.native_batch_norm_backward.default: _norm_backward,
}
