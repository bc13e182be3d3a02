"""Which functions of PyTorch rows by bands can do without: what these join, raise and pool is made as it is read.

A call of `torch.cat`, `F.interpolate`, `F.conv_transpose2d` or `F.max_pool2d` as a source of a row by bands
(`revseg.layers.bands.local`), and as a map that waits until somebody looks at it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg.layers.bands.local import Pooled, Repeated, Resized, Rule, Transposed
from revseg.memory.waiting import Waiting, linear_upsampling, new_size, of_interpolate
from revseg.replay.context import is_casting

_JOINS = (torch.cat, torch.concat, torch.concatenate)
_RAISES = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_POOLS = (
    *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d),
)
_OF_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_OF_POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_Made = tuple[Rule, Tensor, list[Tensor]]  # how, of which map, and what else is differentiated


def made_later(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Waiting | None:
    """What waits in the place of a joined or raised map; None where it is to be made at once."""
    maps = joined_maps(function, args, kwargs)
    if maps is not None:
        if not are_alike(maps):
            return None
        shape = maps[0].shape[0], sum(x.shape[1] for x in maps), *maps[0].shape[2:]
        return _if_trained(Waiting(shape, maps[0], function, args, kwargs))
    found = None if function in _POOLS else rule_of(function, args, kwargs)
    if found is None:
        return None
    rule, x, others = found
    return _if_trained(Waiting(rule.shape(x.shape, others), _cast(rule, x), function, args, kwargs))


def _if_trained(waiting: Waiting) -> Waiting | None:
    """None if nothing that the map is made of has a gradient; a first run does not say so."""
    return waiting if waiting.requires_grad or not waiting.graph else None


def _cast(rule: Rule, x: Tensor) -> Tensor:
    """A tensor of the dtype of what is made."""
    cast = rule.cast if isinstance(rule, Transposed) else None
    return x if cast is None else torch.empty((), dtype=cast, device=x.device)


def joined_maps(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """What a call joins by the channels of maps; None if it does something else."""
    if function not in _JOINS:
        return None
    maps = args[0] if args else kwargs.get("tensors")
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    return list(maps) if isinstance(maps, (list, tuple)) and maps and dim == 1 else None


def are_alike(maps: list[Tensor]) -> bool:
    """Whether these are maps of one size, dtype and device."""
    if not all(isinstance(x, Tensor) for x in maps):
        return False
    first = maps[0]
    same = all(
        (x.dtype, x.device, x.ndim, x.shape[2:]) == (first.dtype, first.device, first.ndim, first.shape[2:])
        for x in maps
    )
    return same and first.ndim in (3, 4, 5) and first.is_floating_point()


def rule_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Made | None:
    """How a call makes a map of another one by rows; None if it does not, or not exactly so."""
    if function is F.interpolate:
        return _interpolation(of_interpolate(args, kwargs))
    if function in _RAISES:
        return _transposed(dict(zip(_OF_CONVOLUTION, args, strict=False)) | kwargs)
    if function in _POOLS:
        return _pooled(dict(zip(_OF_POOL, args, strict=False)) | kwargs)
    return None


def _interpolation(given: dict[str, Any]) -> _Made | None:
    x = given["input"]
    if not isinstance(x, Tensor) or x.ndim not in (3, 4, 5) or not x.is_floating_point():
        return None
    low, size, align_corners = linear_upsampling(given)
    if low is not None:
        return Resized(size, align_corners), x, []
    size_asked = new_size(given) if given.get("mode", "nearest") == "nearest" else None
    if size_asked is None or any(new % old for new, old in zip(size_asked, x.shape[2:], strict=True)):
        return None
    times = tuple(new // old for new, old in zip(size_asked, x.shape[2:], strict=True))
    return Repeated(times), x, []


def _transposed(given: dict[str, Any]) -> _Made | None:
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if x.ndim != weight.ndim:
        return None
    dims = x.ndim - 2
    stride, padding, extra, dilation = (
        _each(given.get(name, default), dims)
        for name, default in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))
    )
    device = x.device.type
    cast = torch.get_autocast_dtype(device) if is_casting(device) else None
    rule = Transposed(tuple(weight.shape[2:]), stride, padding, extra, given.get("groups", 1), dilation, cast)
    return (rule, x, [weight] if bias is None else [weight, bias]) if rule.is_local() else None


def _pooled(given: dict[str, Any]) -> _Made | None:
    x, kernel = given["input"], given["kernel_size"]
    if given.get("ceil_mode") or given.get("return_indices"):
        return None
    dims = x.ndim - 2
    stride = given.get("stride") or kernel
    padding, dilation = given.get("padding", 0), given.get("dilation", 1)
    return Pooled(*(_each(value, dims) for value in (kernel, stride, padding, dilation))), x, []


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values
