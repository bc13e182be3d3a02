"""What convolutions on a CPU take inside, beside their results.

oneDNN lays maps out in blocks of channels, or pixel by pixel: arguments are copied, the result is made in that layout and
then copied back. First comes the gradient of the map, with all copies it needs, then that of the weight, with copies of its
own. Where oneDNN is not used, and where its kernels give up, the columns of the map are laid out, every pixel as often as the kernel
has places.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revseg.memory.convolution import BLOCK, SMALL_BLOCK, Convolution
from revseg.memory.inside import Workspace, copies

_IMAGE = 3  # channels of a map that is read as it lies
# Overhanging pixels from which the gradient of a map is made of columns, by the blocks of its channels:
_OVERHANG, _LARGE_OVERHANG = {1: 16, 2: 11}, 8
_NARROW = 48  # not in float32, if the map has no more columns than these
_HALF_OVERHANG = 16  # in half precision, whatever the channels
_SUMS = 4  # gradients of a weight in float32 that are summed where they are made of columns
_MORE = 3  # columns by which rows that are turned round are longer, beside their padding
_PIXELS = 64  # of an image that are turned round at one time, by kernels of one place
# Bytes in which kernels with matrix tiles lay out rows of an image: for maps, by whether many channels are read, and
# for the gradient of a weight, by whether there is a stride.
_TILE_ROOM, _MANY = {False: 192 * 1024, True: 768 * 1024}, 128
_WEIGHT_ROOM = {False: 640 * 1024, True: 1280 * 1024}
_ROWS = {False: 80 * 1024, True: 160 * 1024}  # beside an image that fits there


def _forward(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Workspace | None:
    x, weight, _, stride, padding, dilation, transposed, out_padding, groups = args[:9]
    conv = Convolution(x, weight, result, stride, padding, dilation, transposed, groups, backward=False)
    return _of(conv, out_padding)


def _backward(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Workspace | None:
    dy, x, weight, _, stride, padding, dilation, transposed, out_padding, groups, wanted = args
    conv = Convolution(
        x, weight, dy, stride, padding, dilation, transposed, groups, backward=True, wanted=wanted
    )
    return _of(conv, out_padding)


CONVOLUTIONS: dict[Any, Callable[[tuple[Any, ...], dict[str, Any], Any], Workspace | None]] = {
    torch.ops.aten.convolution.default: _forward,
    torch.ops.aten.convolution_backward.default: _backward,
}


def _of(conv: Convolution, out_padding: list[int]) -> Workspace:
    """Maps that are parts of larger ones are copied first, whoever runs the convolution."""
    sizes = list(conv.stride), list(conv.padding), list(conv.dilation)
    backend = torch._C._select_conv_backend(
        conv.x, conv.weight, None, *sizes, conv.transposed, list(out_padding), conv.groups
    ).name
    found = _slow(backend, conv) if backend.startswith("Slow") else _onednn(conv)
    whole = copies(conv.order, conv.x, conv.y) if conv.backward else copies(conv.order, conv.x)
    return Workspace(found.before + whole, found.beside + whole, found.copied + whole)


def _slow(backend: str, conv: Convolution) -> Workspace:
    """Columns, of all images at once in `Slow2d` and `Slow3d`; groups one after the other, then joined."""
    at_once = len(conv.x) if backend in ("Slow2d", "Slow3d") else 1
    columns = conv.columns * at_once // (1 if conv.transposed else conv.groups)
    if conv.groups == 1:
        return Workspace(0, columns, columns)
    pieces = conv.x.nbytes + conv.y.nbytes // conv.groups if conv.backward else conv.y.nbytes
    return Workspace(pieces + columns, pieces, 2 * pieces + columns)


def _onednn(conv: Convolution) -> Workspace:
    """By layout and direction."""
    last = conv.order is not torch.contiguous_format
    if not conv.backward:
        return _last_forward(conv) if last else _blocked_forward(conv)
    of_map, of_weight = (_last_map, _last_weight) if last else (_blocked_map, _blocked_weight)
    before = beside = copied = 0
    if conv.wanted[0]:
        stage = of_map(conv)
        before, beside, copied = stage.before, stage.beside, stage.before + stage.beside
    if conv.wanted[1]:
        stage, there = of_weight(conv), conv.x.nbytes if conv.wanted[0] else 0
        before, copied = max(before, beside + there, stage.before + there), max(copied, stage.before)
        beside = stage.beside
    return Workspace(before, beside, copied)


# --- maps that lie channel by channel: copied into blocks of channels, or pixel by pixel ---------------------


def _blocked_forward(conv: Convolution) -> Workspace:
    x, y, w = conv.x, conv.y, conv.weight.nbytes
    if conv.tiles:
        before = x.nbytes + _tiled_weight(conv) + y.nbytes + _tile_room(conv) + _picked(conv)
        return Workspace(before, 2 * y.nbytes, before)
    if conv.half and max(conv.padding) >= _HALF_OVERHANG and not conv.depthwise and not conv.transposed:
        return Workspace(conv.columns + 2 * y[0].nbytes + y.nbytes, y.nbytes, conv.columns)
    read = 0 if x.shape[1] < BLOCK and not conv.transposed and not conv.depthwise else _blocked(x)
    before = read + w + _blocked(y) + _picked(conv)
    if conv.transposed:
        return Workspace(before, 2 * y.nbytes, max(before, 2 * y.nbytes))
    beside = before if conv.half and conv.single else _blocked(y)
    return Workspace(before, beside, max(before, beside))


def _blocked_map(conv: Convolution) -> Workspace:
    """The gradient of the map: before it is there in its own layout, and then."""
    x, y, w = conv.x, conv.y, conv.weight.nbytes
    if conv.tiles:
        return Workspace(x.nbytes + _tiled_weight(conv) + y.nbytes + _tile_room(conv), 2 * x.nbytes)
    if conv.is_thin:
        return Workspace(x.nbytes, x.nbytes)
    if conv.strided and not conv.transposed and (not conv.depthwise or conv.half):
        return Workspace(y.nbytes + w + x.nbytes, 2 * x.nbytes)
    if _is_far(conv):
        wide = 2 if conv.half else 1  # columns and an image in float32
        return Workspace(x.nbytes + wide * conv.columns + (2 * x[0].nbytes if conv.half else 0), x.nbytes)
    return Workspace(_blocked(y) + w + _blocked(x), _blocked(x))


def _blocked_weight(conv: Convolution) -> Workspace:
    """The gradient of the weight: before it is there in its own layout, and then."""
    x, y, w = conv.x, conv.y, conv.weight.nbytes
    if conv.is_higher_than_map and not conv.depthwise:
        return Workspace(w + conv.columns + _SUMS * conv.sums, w)  # rows beyond the map
    if conv.tiles:
        tiled = _tiled_weight(conv)
        return Workspace(x.nbytes + y.nbytes + 3 * tiled + _weight_room(conv), tiled)
    if conv.is_thin:
        return Workspace(x.nbytes, w)
    few = x.shape[1] < BLOCK and not conv.transposed and not conv.depthwise
    if conv.half and not conv.depthwise:
        if conv.groups > 1 or (few and y.shape[1] % BLOCK):
            return Workspace(w + conv.columns // conv.groups + conv.sums, w)
        read = 0 if few else _blocked(x)
        return Workspace(read + _blocked(y) + w + conv.sums + _transposed_image(conv), w)
    image = few and x.shape[1] <= _IMAGE
    if few and not image and max(conv.dilation) > 1:
        return Workspace(w + conv.columns + _SUMS * conv.sums, w)
    block = SMALL_BLOCK if few and not image else BLOCK
    return Workspace((0 if image else _blocked(x, block)) + _blocked(y, block) + w + _picked(conv), w)


# --- maps that lie pixel by pixel: read as they lie ----------------------------------------------------------


def _last_forward(conv: Convolution) -> Workspace:
    w = conv.weight.nbytes
    beside = _own_weight(conv) + _grouped_weight(conv) + _tile_room(conv)
    if conv.tiles:
        beside += _picked(conv)
    if conv.transposed and conv.strided:
        beside += conv.x[0].nbytes  # as the gradient of a map with a stride
    return Workspace(w, beside, beside)


def _last_map(conv: Convolution) -> Workspace:
    """Gradients of maps with a stride are made of an image of what arrives, that is copied."""
    beside = _own_weight(conv) + _grouped_weight(conv)
    if conv.strided and not conv.transposed and (conv.half or not conv.depthwise):
        beside += conv.y[0].nbytes
    else:
        beside += _tile_room(conv)
    return Workspace(0, beside)


def _last_weight(conv: Convolution) -> Workspace:
    """Weights that lie otherwise are copied for it; the gradient is made in blocks, then copied."""
    w, own = conv.weight.nbytes, _own_weight(conv)
    if conv.is_higher_than_map and not conv.depthwise:
        rows = conv.columns + conv.x[0].nbytes + _SUMS * conv.sums
        return Workspace(own + w + rows, own + 2 * w)
    if conv.is_higher_than_map:
        return Workspace(own + w, own + 2 * w)
    blocks = _grouped_weight(conv)
    if conv.tiles:
        tiled = _tiled_weight(conv)
        return Workspace(own + 3 * tiled + _weight_room(conv), own + tiled + w)
    if not conv.half or (conv.depthwise and not conv.as_groups):
        return Workspace(own + blocks + _picked(conv), own + blocks + w)
    of_x, of_y = (-(-channels // BLOCK) * BLOCK / channels for channels in conv.of_group)
    sums = int(conv.sums * of_x * of_y)
    return Workspace(own + blocks + sums + _transposed_image(conv), own + blocks + w)


def _own_weight(conv: Convolution) -> int:
    """Bytes of the weight copied as the maps lie."""
    return copies(conv.order, conv.weight)


def _grouped_weight(conv: Convolution) -> int:
    """Bytes of the weight in blocks; groups each in whole ones."""
    w = conv.weight.nbytes
    ordinary = conv.groups == 1 or conv.transposed
    if ordinary or (conv.of_group == (1, 1) and not (conv.backward and conv.as_groups)):
        return w
    blocks = math.prod(-(-channels // BLOCK) * BLOCK for channels in conv.of_group)
    return w * blocks // math.prod(conv.of_group)


# --- parts ------------------------------------------------------------------------------------------------


def _is_far(conv: Convolution) -> bool:
    """Whether the kernel overhangs too far for the gradient of a map to be made in blocks."""
    if conv.depthwise or conv.transposed:
        return False
    if conv.half:
        return conv.overhang >= _HALF_OVERHANG
    blocks = -(-conv.x.shape[1] // BLOCK)
    return conv.x.shape[-1] > _NARROW and conv.overhang >= _OVERHANG.get(blocks, _LARGE_OVERHANG)


def _picked(conv: Convolution) -> int:
    """Bytes of those pixels of an image that a kernel of one place reads."""
    if not conv.single or not conv.strided or conv.transposed:
        return 0
    return conv.x[0].nbytes * conv.y[0, 0].numel() // conv.x[0, 0].numel()


def _transposed_image(conv: Convolution) -> int:
    """Bytes of an image of both maps, turned round in half precision, the one read with its padding."""
    x, y = conv.x, conv.y
    if x.shape[1] <= _IMAGE and not conv.transposed:  # of one block of channels
        return (0 if conv.order is torch.contiguous_format else x[0].nbytes) + y[0, :BLOCK].nbytes
    of_x, of_y = (-(-channels // BLOCK) * BLOCK / channels for channels in conv.of_group)
    if conv.single:
        if conv.order is torch.contiguous_format and y[0, 0].numel() % _PIXELS == 0:
            return _picked(conv)  # neither map needs to be turned
        half = conv.order is torch.contiguous_format and not conv.strided
        read = 2 * _picked(conv) if conv.strided else x[0].nbytes // (2 if half else 1)
        return int(read * of_x + y[0].nbytes * of_y)
    padded = (x.shape[-1] + conv.padding[-1] + _MORE) / x.shape[-1]
    return int(x[0].nbytes * of_x * padded + y[0].nbytes * of_y)


def _tiled_weight(conv: Convolution) -> int:
    """Bytes of the weight as tiles read it: channels in whole blocks, those that are summed in pairs of these."""
    read, written = conv.of_group
    block = 2 * BLOCK if conv.backward else 1
    k = math.prod(conv.weight.shape[2:]) * conv.groups * conv.weight.element_size()
    return -(-read // block) * block * -(-written // BLOCK) * BLOCK * k


def _tile_room(conv: Convolution) -> int:
    """Bytes of rows of an image, laid out for tiles; kernels of one place read the map itself."""
    if not conv.tiles or conv.single:
        return 0
    read = conv.y if conv.backward else conv.x
    many = read.shape[1] >= _MANY
    if many and conv.strided and not conv.backward:
        return 2 * read[0].nbytes
    return min(3 * (conv.x[0].nbytes + conv.y[0].nbytes), _TILE_ROOM[many])


def _weight_room(conv: Convolution) -> int:
    """Bytes of rows of an image of both maps, laid out for the gradient of a weight by tiles; of groups all that they read."""
    pair = 2 * BLOCK
    maps = sum(_blocked(x[:1], pair) for x in (conv.x, conv.y))
    read = (
        -(-conv.of_group[0] // pair) * pair * conv.x[0].nbytes // conv.of_group[0] if conv.groups > 1 else 0
    )
    strided = conv.strided and not conv.single
    return max(read, min(maps + min(_ROWS[strided], 3 * maps // 2), _WEIGHT_ROOM[strided]))


def _blocked(x: Tensor, block: int = BLOCK) -> int:
    """Bytes with channels filled up to whole blocks."""
    channels = x.shape[1]
    return x.numel() * x.element_size() // channels * (-(-channels // block) * block)
