"""One convolution, as the library sees that runs it on a CPU: its maps, its kernel, and how these lie."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from revseg.memory.inside import lies_by_pixels, order_of

BLOCK = 16  # channels that oneDNN lays side by side
SMALL_BLOCK = 8  # and for gradients of weights, if the map has fewer than 16
_WIDE = 3  # columns of a kernel, beyond which gradients of depthwise weights are made as for any groups


@dataclass(frozen=True)
class Convolution:
    """Forward or backward.

    Args:
        x: The map that is read [N, C, ...].
        weight: The kernel.
        y: The map that is written, or backward its gradient, which is read.
        stride: By dimension, as the padding and the dilation.
        padding: Beside both sides.
        dilation: From place to place.
        transposed: Whether it is.
        groups: How many.
        backward: Whether gradients are made.
        wanted: Which: of the map, the weight, the bias.
    """

    x: Tensor
    weight: Tensor
    y: Tensor
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    groups: int
    backward: bool
    wanted: Sequence[bool] = (True, True, False)

    @cached_property
    def half(self) -> bool:
        return self.x.element_size() == 2

    @cached_property
    def single(self) -> bool:
        """Whether the kernel has one place."""
        return math.prod(self.weight.shape[2:]) == 1

    @cached_property
    def strided(self) -> bool:
        return max(self.stride) > 1

    @cached_property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.x.shape[1]

    @cached_property
    def of_group(self) -> tuple[int, int]:
        """Channels read and written by a group."""
        return self.x.shape[1] // self.groups, self.y.shape[1] // self.groups

    @cached_property
    def tiles(self) -> bool:
        """Whether kernels with matrix tiles are used."""
        return self.half and not self.depthwise and has_tiles()

    @cached_property
    def order(self) -> torch.memory_format:
        """In which maps are read and written."""
        return order_of(self.x if lies_by_pixels(self.x) else self.y)

    @property
    def reach(self) -> list[int]:
        """Pixels from the first place of the kernel to its last."""
        return [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=False)]

    @property
    def is_higher_than_map(self) -> bool:
        """Whether the kernel is, so that some of its rows see padding alone."""
        return self.reach[0] >= self.x.shape[2] and not self.transposed

    @property
    def overhang(self) -> int:
        """How many pixels of its reach lie beyond the padding."""
        return max(n - p for n, p in zip(self.reach, self.padding, strict=False))

    @property
    def is_thin(self) -> bool:
        """Whether groups are too thin for blocks of channels."""
        thin = self.groups > 1 and not self.transposed and self.of_group[0] < SMALL_BLOCK
        return thin and (not self.depthwise or self.as_groups)

    @property
    def as_groups(self) -> bool:
        """Whether gradients of a depthwise convolution are made as those of any groups."""
        wide = self.wanted[1] and self.weight.shape[-1] > _WIDE
        return wide or max(self.dilation) > 1

    @property
    def columns(self) -> int:
        """Bytes of every pixel of an image as often as the kernel has places; 0 if that is the map itself."""
        k = math.prod(self.weight.shape[2:])
        if k == 1 and set(self.stride) == {1} and not any(self.padding):
            return 0
        if self.transposed:
            return self.weight.shape[1] * self.groups * k * self.x[0, 0].numel() * self.x.element_size()
        return self.x.shape[1] * k * self.y[0, 0].numel() * self.x.element_size()

    @property
    def sums(self) -> int:
        """Bytes of the weight in float32."""
        return 4 * self.weight.numel()


def has_tiles() -> bool:
    """Whether oneDNN has matrix tiles on this processor."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    allowed = most in ("ALL", "DEFAULT") or "AMX" in most
    return allowed and bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
