"""What convolutions and batch norms on a CPU, and softmax, take inside, beside their results.

The allocator sees it, a caller does not. oneDNN lays maps out in blocks of channels: input, weight and result are
copied, the result then copied back. Where oneDNN is not used the columns of the map are laid out, every pixel as often as the
kernel has places. The rules below are read from torch 2.13's events, on a processor with vectors of 512 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BLOCK = 16  # channels that oneDNN lays side by side
_SMALL_BLOCK = 8  # and for gradients of weights, if there are no more
_FAR = 8  # overhanging pixels from which the gradient of a map is made of columns,
_FEW = 64  # if it has no more channels than these
_WIDE = 3  # columns of a kernel, beyond which gradients of depthwise weights are made as for any groups
_BOTH = (True, True, False)
_FORWARD = torch.ops.aten.convolution.default
_BACKWARD = torch.ops.aten.convolution_backward.default
_SOFTMAX = (torch.ops.aten._log_softmax.default, torch.ops.aten._softmax.default)
_BACKWARD_OF_SOFTMAX = (
    torch.ops.aten._log_softmax_backward_data.default,
    torch.ops.aten._softmax_backward_data.default,
)
_BACKWARD_OF_NORM = torch.ops.aten.native_batch_norm_backward.default


@dataclass(frozen=True)
class Workspace:
    """Bytes beside the arguments: the most while results are not there yet, and the most while they are."""

    before: int
    beside: int

    def copied(self, func: Any) -> int:
        """Bytes that are copied in all; forward what stands beside the result is the result once more."""
        if func is _BACKWARD_OF_NORM:
            return 0
        if func in (*_SOFTMAX, *_BACKWARD_OF_SOFTMAX):
            return self.beside
        return self.before + self.beside if func is _BACKWARD else max(self.before, self.beside)


@dataclass(frozen=True)
class _Conv:
    x: Tensor
    weight: Tensor
    y: Tensor
    stride: list[int]
    padding: list[int]
    transposed: bool
    groups: int
    backward: bool
    dilation: list[int]
    wanted: Sequence[bool] = _BOTH

    @property
    def reach(self) -> int:
        """Pixels from the first place of the kernel to its last."""
        return max(d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=False))

    @property
    def is_larger_than_map(self) -> bool:
        """Whether the kernel is, in every direction."""
        sizes = zip(self.dilation, self.weight.shape[2:], self.y.shape[2:], strict=False)
        return all(d * (k - 1) >= n for d, k, n in sizes)

    @property
    def overhang(self) -> int:
        """How many of these lie beyond the padding."""
        sizes = zip(self.dilation, self.weight.shape[2:], self.padding, strict=False)
        return max(d * (k - 1) - p for d, k, p in sizes)

    @property
    def as_groups(self) -> bool:
        """Whether gradients of a depthwise convolution are made as those of any groups."""
        wide = self.wanted[1] and self.weight.shape[-1] > _WIDE
        return wide or max(self.dilation) > 1

    @property
    def columns(self) -> int:
        """Bytes of every pixel as often as the kernel has places; 0 if that is the map itself."""
        k = math.prod(self.weight.shape[2:])
        if k == 1 and set(self.stride) == {1} and not any(self.padding):
            return 0
        if self.transposed:
            return self.weight.shape[1] * self.groups * k * self.x[0, 0].numel() * self.x.element_size()
        return self.x.shape[1] * k * self.y[0, 0].numel() * self.x.element_size()  # of one image


def workspace(func: Any, args: tuple[Any, ...], result: Any) -> Workspace | None:
    """Of an operation on a CPU; None if it has none that is known."""
    if func is _BACKWARD_OF_NORM:
        return _of_norm(args[0], args[1]) if args[9][0] else None
    if func in (*_SOFTMAX, *_BACKWARD_OF_SOFTMAX):
        read = args[: 1 if func in _SOFTMAX else 2]
        return Workspace(0, sum(x.nbytes for x in read if not x.is_contiguous()))
    if func is _FORWARD:
        x, weight, _, stride, padding, dilation, transposed, out_padding, groups = args[:9]
        conv = _Conv(x, weight, result, stride, padding, transposed, groups, False, dilation)
    elif func is _BACKWARD:
        dy, x, weight, _, stride, padding, dilation, transposed, out_padding, groups = args[:10]
        conv = _Conv(x, weight, dy, stride, padding, transposed, groups, True, dilation, args[10])
    else:
        return None
    if x.device.type != "cpu" or not x.numel():
        return None
    backend = torch._C._select_conv_backend(
        x, weight, None, list(stride), list(padding), list(dilation), transposed, list(out_padding), groups
    ).name
    if backend.startswith("Slow"):
        return _slow(backend, conv)
    return _onednn(conv)


def _of_norm(dy: Tensor, x: Tensor) -> Workspace | None:
    """Of two maps that lie alike the gradient is asked for twice, and the first one goes."""
    if x.device.type != "cpu":
        return None
    last_of_dy, last_of_x = _is_channels_last(dy), _is_channels_last(x)
    if last_of_x and not last_of_dy and x.element_size() == 2 and dy.is_contiguous():
        return Workspace(0, 2 * x.nbytes)  # in float32
    alike = (last_of_dy and last_of_x) or (dy.is_contiguous() and x.is_contiguous())
    return Workspace(0, x.nbytes) if alike else None


def _slow(backend: str, conv: _Conv) -> Workspace:
    """Columns, of all images at once in `Slow2d` and `Slow3d`; groups one after the other, then joined."""
    at_once = len(conv.x) if backend in ("Slow2d", "Slow3d") else 1
    columns = conv.columns * at_once // (1 if conv.transposed else conv.groups)
    if conv.groups == 1:
        return Workspace(0, columns)
    pieces = conv.x.nbytes + conv.y.nbytes // conv.groups if conv.backward else conv.y.nbytes
    return Workspace(pieces + columns, pieces)


def _onednn(conv: _Conv) -> Workspace:
    """Copies in blocks of channels."""
    x, y, w = conv.x, conv.y, conv.weight.nbytes
    if _is_channels_last(x) or _is_channels_last(y):
        return _channels_last(conv)
    half, single = x.element_size() == 2, math.prod(conv.weight.shape[2:]) == 1
    channels, depthwise = x.shape[1], conv.groups == x.shape[1]
    if not conv.backward:
        read = 0 if channels < _BLOCK and not conv.transposed and not depthwise else _blocked(x)
        if conv.transposed:
            return Workspace(read + w + _blocked(y), 2 * y.nbytes)
        copies = read + w + _blocked(y)
        return Workspace(copies, copies if half and single else _blocked(y))
    thin = conv.groups > 1 and not conv.transposed and channels // conv.groups < _SMALL_BLOCK
    if thin and (not depthwise or conv.as_groups):
        return Workspace(x.nbytes, x.nbytes)
    sums = (
        5 * _blocked(x[:1]) // 2 if half and not single and not depthwise else 0
    )  # in float32, of one image
    small = _SMALL_BLOCK if channels <= _SMALL_BLOCK else _BLOCK
    of_weight = (
        (2 * w if half else w) + sums + (_blocked(x, small) if channels > 3 else 0) + _blocked(y, small)
    )
    if conv.reach >= min(y.shape[2:]) and not depthwise:
        of_weight = conv.columns + 4 * (
            2 * w if half else w
        )  # by columns, as the kernel is larger than the map
    if not conv.wanted[0]:
        return Workspace(0, of_weight if conv.wanted[1] else 0)
    of_weight = of_weight if conv.wanted[1] else 0
    if max(conv.stride) > 1 and not depthwise and not conv.transposed:
        return Workspace(_blocked(y) + w + x.nbytes, max(2 * x.nbytes, of_weight))
    if conv.overhang >= _FAR and channels <= _FEW and not depthwise and not half and not conv.transposed:
        return Workspace(x.nbytes + conv.columns, of_weight)
    return Workspace(_blocked(y) + w + _blocked(x), max(_blocked(x), of_weight))


def _channels_last(conv: _Conv) -> Workspace:
    """Maps are copied if they lie otherwise, and weights: of groups each for itself, in whole blocks of channels.

    Weights that do not lie so too are copied for that; their gradient is made in blocks, and summed beside these.
    """
    w = conv.weight.nbytes
    order = torch.channels_last if conv.x.ndim == 4 else torch.channels_last_3d
    read = (conv.x, conv.y) if conv.backward else (conv.x,)
    copied = sum(x.nbytes for x in read if not x.is_contiguous(memory_format=order))
    of_group = (conv.x.shape[1] // conv.groups, conv.y.shape[1] // conv.groups)
    lies_so = conv.weight.is_contiguous(memory_format=order)
    beside = (0 if lies_so else w) + (2 * w if conv.backward and conv.wanted[1] else w)
    if conv.groups > 1 and not conv.transposed and (of_group != (1, 1) or (conv.backward and conv.as_groups)):
        blocks = math.prod(-(-channels // _BLOCK) * _BLOCK for channels in of_group)
        beside = w + w * blocks // math.prod(of_group)
    elif conv.backward and conv.wanted[1] and conv.groups == 1 and conv.is_larger_than_map:
        beside = conv.columns + (9 if conv.x.element_size() == 2 else 4) * w
        return Workspace(copied + w, copied + beside)
    if conv.x.element_size() == 2 and conv.backward and conv.wanted[1] and not conv.transposed:
        beside = _of_half_weight(conv, of_group) or beside
    return Workspace(copied + w, copied + beside)


def _of_half_weight(conv: _Conv, of_group: tuple[int, int]) -> int:
    """For the gradient of a weight in half precision both maps of an image are laid out by pixels, the gradient is summed in float32.

    Groups each in whole blocks of channels; 0 for depthwise kernels that go by themselves.
    """
    depthwise = conv.groups > 1 and of_group == (1, 1)
    if depthwise and not conv.as_groups:
        return 0
    of_x, of_y = (-(-channels // _BLOCK) * _BLOCK // channels for channels in of_group)
    maps = (conv.x.nbytes * of_x + conv.y.nbytes * of_y) // len(conv.x)
    times = 2 if math.prod(conv.weight.shape[2:]) == 1 else 3
    of_map = conv.x.nbytes if depthwise and max(conv.dilation) > 1 else 0
    return times * conv.weight.nbytes * of_x * of_y + maps + of_map


def _blocked(x: Tensor, block: int = _BLOCK) -> int:
    """Bytes with channels filled up to whole blocks; `_SMALL_BLOCK` is for fewer channels than that alone."""
    channels = x.shape[1]
    block = block if channels <= block else _BLOCK
    return x.numel() * x.element_size() // channels * (-(-channels // block) * block)


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim in (4, 5) and x.stride(1) == 1 and x.shape[1] > 1 and x[0, 0].numel() > 1
