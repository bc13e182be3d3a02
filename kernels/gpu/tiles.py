"""How programs share a map whose channels are treated apart.

A tile is P pixels of one image by Q channels; a map in channels_last counts as one image of all
pixels. A program owns every S-th tile of its Q channels. The S parts of a sum are then added by one
program, always in the same order. S follows from the shape of the map
alone, so that sums have the same bits on every run and do not depend on how large a GPU is.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024
SIZE = 2048  # values of a tile


@dataclass(frozen=True)
class Tiles:
    """The tiles of a map.

    Attributes:
        count: Of Q channels.
        groups: Of Q channels.
        pixels: Of an image.
        constants: What kernels are compiled for.
    """

    count: int
    groups: int
    pixels: int
    constants: dict[str, Any]

    @classmethod
    def of(cls, u: Tensor) -> "Tiles":
        images, channels, height, width = u.shape
        pixels, channels_last = height * width, not u.is_contiguous()
        if channels_last and not u.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"expected a map contiguous or in channels_last, got strides {u.stride()}")
        if channels_last:
            images, pixels = 1, images * pixels
            q = min(triton.next_power_of_2(channels), 128)
            p = min(triton.next_power_of_2(pixels), SIZE // q)
        else:
            p = min(triton.next_power_of_2(pixels), SIZE)
            q = min(triton.next_power_of_2(channels), SIZE // p)
        constants = {"C": channels, "P": p, "Q": q, "CHANNELS_LAST": channels_last}
        constants["LARGE"] = u.numel() >= 2**31
        return cls(images * triton.cdiv(pixels, p), triton.cdiv(channels, q), pixels, constants)

    def parts(self) -> int:
        """S, how many programs share the tiles of Q channels."""
        return min(self.count, max(1, PROGRAMS // self.groups))


@dataclass(frozen=True)
class Parts:
    """How programs add the parts of sums: each those of Q channels."""

    groups: int
    constants: dict[str, int]

    @classmethod
    def of(cls, count: int, channels: int) -> "Parts":
        padded = triton.next_power_of_2(count)
        q = min(triton.next_power_of_2(channels), max(1, SIZE // padded))
        return cls(triton.cdiv(channels, q), {"C": channels, "S": padded, "Q": q})


@triton.jit
def pixels_of(tile, pixels, P: tl.constexpr):
    """The image of a tile, its first pixel, and how many there are."""
    in_image = tl.cdiv(pixels, P)
    first = (tile % in_image) * P
    return tile // in_image, first, tl.minimum(pixels - first, P)


@triton.jit
def place_of(
    tile, pixels, C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr
):  # fmt: skip
    """Offsets of the values of a tile [P, Q], and which of them lie inside of the map."""
    image, first, valid = pixels_of(tile, pixels, P)
    i = tl.arange(0, P)[:, None]
    c = tl.program_id(1) * Q + tl.arange(0, Q)[None, :]
    inside = (i < valid) & (c < C)
    p = first + i
    if LARGE:
        image, p, c = image.to(tl.int64), p.to(tl.int64), c.to(tl.int64)
    if CHANNELS_LAST:
        place = p * C + c
    else:
        place = (image * C + c) * pixels + p
    return place, inside


@triton.jit
def sum_of_pixels(values):
    """Of a tile [P, Q] the sums by channel [Q]; in two stages, for the interpreter adds one value after another."""
    P: tl.constexpr = values.shape[0]
    Q: tl.constexpr = values.shape[1]
    STAGE: tl.constexpr = 16 if P > 16 else 1
    return tl.sum(tl.sum(tl.reshape(values, [STAGE, P // STAGE, Q]), 0), 0)


@triton.jit
def part_of(part, count, C: tl.constexpr, S: tl.constexpr, Q: tl.constexpr):
    """Offsets [S, Q] of the parts of sum `part` in memory [sums, S, C], which are inside, and the channels [Q]."""
    s = tl.arange(0, S)[:, None]
    c = tl.program_id(0) * Q + tl.arange(0, Q)
    return (part * count + s) * C + c[None, :], (s < count) & (c < C)[None, :], c
