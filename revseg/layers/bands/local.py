"""Inputs of rows by bands that are made as they are read: maps joined by their channels, raised, pooled.

What a U-Net joins, what a decoder raises to the size of another map, is several times the size of what it is made of, and read
once. As a source (`revseg.layers.bands.sources`) such a map exists in bands, and so does its gradient: that which is written
is at once taken to the maps below.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg.layers.bands.rows import Images, Whole
from revseg.layers.bands.sources import Source
from revseg.layers.bands.window import Window
from revseg.tensors import LINEAR, in_layout

_POOLS = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}


class Joined(Source):
    """Maps joined by their channels.

    Args:
        maps: Of one size; maps that are there, or sources.
    """

    def __init__(self, *maps: Whole) -> None:
        self.maps = maps
        self.parts = tuple(part for each in maps for part in each.parts)
        n, _, *size = maps[0].shape
        self.shape = n, sum(each.shape[1] for each in maps), *size

    def plain(self) -> Tensor:
        found = (each.plain() if isinstance(each, Source) else each.parts[0] for each in self.maps)
        return torch.cat(tuple(found), 1)

    def like(self) -> Joined:
        return Joined(*(each.like() for each in self.maps))

    def taking(self, memory: Tensor) -> Whole | None:
        for i, each in enumerate(self.maps):
            taken = each.taking(memory)
            if taken is not None:
                return Joined(*(taken if k == i else other.like() for k, other in enumerate(self.maps)))
        return None

    def rows(self, images: Images, first: int, last: int, layout: torch.memory_format | None) -> Tensor:
        band = torch.cat([each.rows(images, first, last, layout) for each in self.maps], 1)
        return band if layout is None else in_layout(band, layout)

    def write(self, images: Images, first: int, band: Tensor) -> None:
        of_maps = torch.split(band, [each.shape[1] for each in self.maps], 1)
        for each, values in zip(self.maps, of_maps, strict=True):
            each.write(images, first, values)


@dataclass(frozen=True)
class Rule:
    """How rows of a map follow from rows of another one. Sizes are tuples of all dimensions behind the channels."""

    @abstractmethod
    def shape(self, x: Sequence[int], others: Sequence[Tensor]) -> tuple[int, ...]:
        """Of the map that is made of one of this shape."""

    @abstractmethod
    def reads(self, first: int, last: int, height: int) -> tuple[int, int]:
        """The rows, of so many, that rows first to last (excluded) follow from."""

    @abstractmethod
    def make(self, x: Tensor, low: int, first: int, last: int, height: int, *others: Tensor) -> Tensor:
        """Rows first to last (excluded), from the rows of x that they follow from, `low` and below."""

    @abstractmethod
    def whole(self, x: Tensor, *others: Tensor) -> Tensor:
        """The map."""


class Local(Source):
    """What a rule makes of a map.

    Args:
        rule: Which.
        x: The map [N, C, H, ...].
        others: What else the rule takes, and differentiates: a weight and a bias.
    """

    def __init__(self, rule: Rule, x: Tensor, *others: Tensor) -> None:
        self.rule, self.parts = rule, (x, *others)
        self.shape = rule.shape(x.shape, others)

    def plain(self) -> Tensor:
        return self.rule.whole(*self.parts)

    def like(self) -> Whole:
        return _GradientOfLocal(self)

    def rows(self, images: Images, first: int, last: int, layout: torch.memory_format | None) -> Tensor:
        x, *others = self.parts
        low, high = self.rule.reads(first, last, x.shape[2])
        with torch.no_grad():
            band = self.rule.make(x[images, :, low:high], low, first, last, x.shape[2], *others)
        return band if layout is None else in_layout(band, layout)


class _GradientOfLocal(Whole):
    """The gradients of what a map is made of; rows of its own that are written are taken there, and added up."""

    def __init__(self, of: Local) -> None:
        self.of, self.shape = of, of.shape
        x, *others = of.parts
        wide = (torch.zeros_like(o, dtype=torch.promote_types(o.dtype, torch.float32)) for o in others)
        self.parts = torch.zeros_like(x), *wide

    def write(self, images: Images, first: int, band: Tensor) -> None:
        x, *others = self.of.parts
        last = first + band.shape[2]
        low, high = self.of.rule.reads(first, last, x.shape[2])
        leaves = [each.detach().requires_grad_() for each in (x[images, :, low:high], *others)]
        with torch.enable_grad():
            made = self.of.rule.make(leaves[0], low, first, last, x.shape[2], *leaves[1:])
        of_x, *of_others = torch.autograd.grad(made, leaves, band.to(made.dtype))
        self.parts[0][images, :, low:high] += of_x
        for total, more in zip(self.parts[1:], of_others, strict=True):
            total += more


@dataclass(frozen=True)
class Transposed(Rule):
    """A transposed convolution, of which each row follows from some row.

    Args:
        kernel: Its size.
        stride: And so on, as in `F.conv_transpose2d`.
        cast: The dtype to which autocast casts; None without.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    dilation: tuple[int, ...]
    cast: torch.dtype | None

    def is_local(self) -> bool:
        """Whether every row reads one at least."""
        return self._window.step <= self._window.reach and not self.output_padding[0]

    @property
    def _window(self) -> Window:
        """Of the convolution that this is the way back of: its rows are the ones that this reads."""
        return Window.of(self.kernel, self.stride, self.padding, self.dilation)[0]

    def shape(self, x: Sequence[int], others: Sequence[Tensor]) -> tuple[int, ...]:
        n, _, *size = x
        settings = zip(
            size, self.kernel, self.stride, self.padding, self.output_padding, self.dilation, strict=True
        )
        raised = ((length - 1) * s - 2 * p + d * (k - 1) + o + 1 for length, k, s, p, o, d in settings)
        return n, others[0].shape[1] * self.groups, *raised

    def reads(self, first: int, last: int, height: int) -> tuple[int, int]:
        return self._window.readers(first, last, height)

    def make(self, x: Tensor, low: int, first: int, last: int, height: int, *others: Tensor) -> Tensor:
        above = self._window.finished(low)  # the first row that the first one makes
        made = self._convolved(x, (0, *self.padding[1:]), *others)
        return made[:, :, first - above : last - above]

    def whole(self, x: Tensor, *others: Tensor) -> Tensor:
        return self._convolved(x, self.padding, *others)

    def _convolved(
        self, x: Tensor, padding: tuple[int, ...], weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        if self.cast is not None:
            x, weight, bias = (None if t is None else t.to(self.cast) for t in (x, weight, bias))  # type: ignore[assignment]
        options = self.stride, padding, self.dilation, True, self.output_padding, self.groups
        return torch.convolution(x, weight, bias, *options)


@dataclass(frozen=True)
class Resized(Rule):
    """Linear interpolation, as `F.interpolate` does it.

    Args:
        size: Of the map, at least that of what it is made of.
        align_corners: As there.
    """

    size: tuple[int, ...]
    align_corners: bool

    def shape(self, x: Sequence[int], others: Sequence[Tensor]) -> tuple[int, ...]:
        return x[0], x[1], *self.size

    def reads(self, first: int, last: int, height: int) -> tuple[int, int]:
        top, bottom = (math.floor(self._position(row, height)) for row in (first, last - 1))
        return min(top, height - 1), min(bottom + 2, height)

    def make(self, x: Tensor, low: int, first: int, last: int, height: int, *others: Tensor) -> Tensor:
        across = self._interpolated(x, (x.shape[2], *self.size[1:]))
        at = [self._position(row, height) for row in range(first, last)]
        above = torch.tensor([min(math.floor(p), height - 1) - low for p in at], device=x.device)
        below = torch.tensor([min(math.floor(p) + 1, height - 1) - low for p in at], device=x.device)
        share = torch.tensor([p - math.floor(p) for p in at], dtype=x.dtype, device=x.device)
        share = share.view(-1, *[1] * (x.ndim - 3))
        return across.index_select(2, above) * (1 - share) + across.index_select(2, below) * share

    def whole(self, x: Tensor, *others: Tensor) -> Tensor:
        return self._interpolated(x, self.size)

    def _interpolated(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        if size == tuple(x.shape[2:]):
            return x
        return F.interpolate(x, size, mode=LINEAR[x.ndim], align_corners=self.align_corners)

    def _position(self, row: int, height: int) -> float:
        if self.align_corners:
            return row * (height - 1) / (self.size[0] - 1) if self.size[0] > 1 else 0.0
        return max((row + 0.5) * height / self.size[0] - 0.5, 0.0)


@dataclass(frozen=True)
class Repeated(Rule):
    """Nearest neighbours, every value so many times along each dimension."""

    times: tuple[int, ...]

    def shape(self, x: Sequence[int], others: Sequence[Tensor]) -> tuple[int, ...]:
        n, channels, *size = x
        return n, channels, *(length * times for length, times in zip(size, self.times, strict=True))

    def reads(self, first: int, last: int, height: int) -> tuple[int, int]:
        return first // self.times[0], (last - 1) // self.times[0] + 1

    def make(self, x: Tensor, low: int, first: int, last: int, height: int, *others: Tensor) -> Tensor:
        above = low * self.times[0]
        return self.whole(x)[:, :, first - above : last - above]

    def whole(self, x: Tensor, *others: Tensor) -> Tensor:
        size = [length * times for length, times in zip(x.shape[2:], self.times, strict=True)]
        return F.interpolate(x, size)


@dataclass(frozen=True)
class Pooled(Rule):
    """Maxima of windows, as `F.max_pool2d` takes them."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def shape(self, x: Sequence[int], others: Sequence[Tensor]) -> tuple[int, ...]:
        n, channels, *size = x
        return n, channels, *(w.height(length) for w, length in zip(self._windows(), size, strict=True))

    def _windows(self) -> list[Window]:
        """Of all dimensions."""
        return Window.of(self.kernel, self.stride, self.padding, self.dilation)

    def reads(self, first: int, last: int, height: int) -> tuple[int, int]:
        return self._windows()[0].inside(first, last, height)

    def make(self, x: Tensor, low: int, first: int, last: int, height: int, *others: Tensor) -> Tensor:
        top, bottom = self._windows()[0].read(first, last)
        rim = max(-top, 0), max(bottom - height, 0)
        if any(rim):
            x = F.pad(x, (*[0, 0] * (x.ndim - 3), *rim), value=-math.inf)
        return self._pooled(x, (0, *self.padding[1:]))

    def whole(self, x: Tensor, *others: Tensor) -> Tensor:
        return self._pooled(x, self.padding)

    def _pooled(self, x: Tensor, padding: tuple[int, ...]) -> Tensor:
        return _POOLS[x.ndim](x, self.kernel, self.stride, padding, self.dilation)
