"""What undoing an update loses, packed: the side information of `exact="lossless"`.

(x + h) - h is not x, but close to it. Read as integers, the bit patterns of the two differ by at
most one for nine values of ten: a code of two bits. The others keep the difference in a byte
more, and the few that do not fit in it, in a whole value more. Differences wrap around, so that
every pattern is restored: signed zeros, infinities, NaN.

All of it is one tensor of bytes for each update, which autograd keeps, counts and offloads as it
does every saved tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from revseg.tensors import bits, describe, flat, has_values, laid_out

CODED = 1 / 4  # bytes a value: the codes
ESCAPES = 0.1  # more of them, as a guess: 0.03 to 0.08 in additive blocks, 0.17 in VNet
_CHUNK = 1 << 17  # values that are packed at a time on a CPU, so that they stay in its cache
_CHUNK_GPU = 1 << 24  # and on a GPU, so that what packing needs is small beside the streams
_ESCAPE = 2  # the one of four codes that is no difference; -2 once its sign is extended
_WIDE = -128  # the one of 256 that is none


@dataclass(frozen=True)
class Layout:
    """How the bytes of one residue are to be read: the wide differences, the codes, the narrow ones."""

    strides: tuple[int, ...]  # of the stream
    escaped: list[int]  # how many differences of each chunk need more than a code
    wide: int  # bytes of those that need more than a byte


def pack(x: Tensor, back: Tensor) -> tuple[Tensor, Layout]:
    """The difference of two streams, uint8 [bytes].

    On a GPU the size is waited for, twice an update. For tensors without values (meta, fake)
    the size is an estimate, and nothing will be restored.

    Args:
        x: The stream before the update, without gaps.
        back: The stream as undoing the update gives it.

    Raises:
        ValueError: If the two are not of one shape and dtype.

    Memory: 2 bits a value; 8 more for one in ten or less, as many as a value has for about one in a
    thousand. Together a fifteenth to a twelfth of a float32 stream. Values much smaller than what
    was added to them need more.
    """
    if (back.shape, back.dtype) != (x.shape, x.dtype):
        raise ValueError(f"uncouple must give back a stream {describe(x)}, got {describe(back)}")
    if not has_values(x):
        return _without_values(x)
    chunks = zip(_chunks(bits(x)), _chunks(bits(laid_out(back, x.stride()))), strict=True)
    return _packed((a - b for a, b in chunks), x.stride())


def add(x: Tensor, h: Tensor, out: Tensor) -> tuple[Tensor, Layout]:
    """Adds h to x; gives what undoing that by a subtraction would lose, as `pack` does.

    Args:
        x: The stream before the update, without gaps.
        h: The value, of the same dtype and strides.
        out: Where the sum goes, of the same strides; may be h.
    """
    if not has_values(x):
        return _without_values(x)
    parts = zip(*(_chunks(flat(each)) for each in (x, h, out)), strict=True)
    return _packed((_added(*part) for part in parts), x.stride())


def _added(x: Tensor, h: Tensor, out: Tensor) -> Tensor:
    """The differences of a part."""
    y = x + h
    back = bits(y - h)
    out.copy_(y)
    return torch.sub(bits(x), back, out=back)


def _without_values(x: Tensor) -> tuple[Tensor, Layout]:
    return x.new_empty(round(x.numel() * (CODED + ESCAPES)), dtype=torch.uint8), Layout(x.stride(), [], 0)


def _packed(differences: Iterable[Tensor], strides: tuple[int, ...]) -> tuple[Tensor, Layout]:
    """The differences of parts, packed."""
    codes, escaped = zip(*map(_encode, differences), strict=True)
    narrow, wide = _narrow(torch.cat(escaped))
    packed = torch.cat((wide.view(torch.uint8), *codes, narrow.view(torch.uint8)))
    return packed, Layout(strides, [len(each) for each in escaped], wide.nbytes)


def restore(back: Tensor, packed: Tensor, layout: Layout) -> Tensor:
    """The stream before the update, bit for bit.

    Args:
        back: The stream as undoing the update gives it; written to.
        packed: What `pack` gave, uint8 [bytes].
        layout: The layout that came with it.
    """
    x = laid_out(back, layout.strides)
    if not has_values(x):
        return x
    values = bits(x)
    sizes = [layout.wide, (len(values) + 3) // 4, sum(layout.escaped)]
    wide, codes, narrow = torch.split(packed, sizes)
    escaped = torch.split(_widen(narrow.view(torch.int8), wide.view(values.dtype)), layout.escaped)
    for part, four, differences in zip(_chunks(values), _chunks(codes, 4), escaped, strict=True):
        part += _decode(four, len(part), differences)
    return x


def _chunks(x: Tensor, values: int = 1) -> tuple[Tensor, ...]:
    """Parts of a vector whose elements stand for so many values each."""
    return torch.split(x, (_CHUNK if x.device.type == "cpu" else _CHUNK_GPU) // values)


def _encode(differences: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of 2 bits, four in a byte, and the differences that need more."""
    codes = differences.clamp(-2, 2).to(torch.int8) & 3
    escaped = differences[_positions(codes == _ESCAPE)]
    a, b, c, d = torch.nn.functional.pad(codes.view(torch.uint8), (0, -len(codes) % 4)).chunk(4)
    return a | b << 2 | c << 4 | d << 6, escaped


def _decode(packed: Tensor, length: int, escaped: Tensor) -> Tensor:
    """The differences [length], of the dtype of the escaped ones."""
    codes = torch.cat([packed << 6 - 2 * k for k in range(4)])[:length].view(torch.int8) >> 6  # with sign
    return codes.to(escaped.dtype).scatter_(0, _positions(codes == -_ESCAPE), escaped)


def _positions(mask: Tensor) -> Tensor:
    """Where a mask [L] is true, int64: on a CPU as numpy finds them, in a third of PyTorch's time or less."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def _narrow(differences: Tensor) -> tuple[Tensor, Tensor]:
    """Differences as bytes, and those that need more."""
    narrow = differences.clamp(-127, 127)
    escaped = narrow != differences
    return narrow.to(torch.int8).masked_fill_(escaped, _WIDE), differences[escaped]


def _widen(narrow: Tensor, wide: Tensor) -> Tensor:
    """The differences that `_narrow` was given."""
    return narrow.to(wide.dtype).masked_scatter_(narrow == _WIDE, wide)
