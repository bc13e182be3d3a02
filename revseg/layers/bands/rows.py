"""Maps of which a part exists: some rows of some images, [n, C, rows, W].

A row is what lies at one place of dimension 2: of a volume [N, C, D, H, W] it is a slice [H, W], of a signal a position.

A `Band` is such a part. A `Whole` is a map that is there, and gives bands of itself; `Kept` a map in pieces, which is given
back as it is used up; `Sliding` a map that is made in order, and never more of it at a time than is needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg.engine.gradients import Grads
from revseg.tensors import CHANNELS_LAST, dense, in_layout, is_channels_last, like

Images = slice  # which of a batch


@dataclass(frozen=True)
class Band:
    """Rows of a map.

    Args:
        values: [n, C, rows, ...].
        first: Which row of the map the first one is.
        height: How many rows the map has.
        images: Which of the batch these are; None for all, or where nobody asks.
    """

    values: Tensor
    first: int
    height: int
    images: Images | None = None

    def rows(self, first: int, last: int) -> Tensor:
        """Some of the rows that are here; a view."""
        return self.values[:, :, first - self.first : last - self.first]

    def padded(self, first: int, last: int) -> Tensor:
        """The same; zeros for rows outside of the map."""
        inside = self.rows(max(first, 0), min(last, self.height))
        above, below = max(-first, 0), max(last - self.height, 0)
        return pad_rows(inside, above, below) if above or below else inside


def pad_rows(x: Tensor, above: int, below: int) -> Tensor:
    """A band with rows of zeros around it, or, where a number is below 0, without so many of its own."""
    return F.pad(x, (*(0, 0) * (x.ndim - 3), above, below))


class Whole:
    """A map that is there.

    Args:
        parts: The map [N, C, rows, ...]; or several that stand for one, joined by their channels.
    """

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts
        n, _, *size = parts[0].shape
        self.shape: tuple[int, ...] = n, sum(part.shape[1] for part in parts), *size

    def like(self) -> Whole:
        """Memory for the gradients of the parts."""
        return Whole(*(torch.empty_like(part) for part in self.parts))

    def taking(self, memory: Tensor) -> Whole | None:
        """Memory for the gradients of the parts, of which this is one's; None if it is like none of them."""
        alone = type(self) is Whole and len(self.parts) == 1
        return Whole(memory) if alone and like(memory) == like(self.parts[0]) else None

    def release(self) -> None:
        """Let the map go; nobody will ask for it again."""
        self.parts = ()

    def rows(self, images: Images, first: int, last: int, layout: torch.memory_format | None) -> Tensor:
        """Rows of some images without gaps, in this layout or that of the map."""
        found = [part[images, :, first:last] for part in self.parts]
        band = found[0] if len(found) == 1 else torch.cat(found, 1)
        return dense(band) if layout is None else in_layout(band, layout)

    def write(self, images: Images, first: int, band: Tensor) -> None:
        """Rows of some images, from a band [n, C, rows, ...]."""
        of_parts = torch.split(band, [part.shape[1] for part in self.parts], 1)
        for part, values in zip(self.parts, of_parts, strict=True):
            part[images, :, first : first + band.shape[2]] = values


class Kept:
    """A map in pieces, written and read in order, group of images by group."""

    def __init__(self) -> None:
        self.pieces: dict[int, deque[tuple[int, Tensor]]] = {}

    def has(self, images: Images) -> bool:
        """Whether there is anything of this group."""
        return images.start in self.pieces

    def append(self, images: Images, first: int, band: Tensor) -> None:
        """Rows that follow those before."""
        if band.shape[2]:
            if band.untyped_storage().nbytes() > band.nbytes:
                band = band.clone()  # or what it was cut out of would stay with it
            self.pieces.setdefault(images.start, deque()).append((first, band))

    def rows(self, images: Images, first: int, last: int, spend: bool) -> Tensor:
        """Rows of a group. Whoever spends the map asks for every row once, in order: what was read is let go."""
        pieces = self.pieces[images.start]
        found = [
            piece[:, :, max(first - start, 0) : last - start]
            for start, piece in pieces
            if start < last and start + piece.shape[2] > first
        ]
        while spend and pieces and pieces[0][0] + pieces[0][1].shape[2] <= last:
            pieces.popleft()
        return found[0] if len(found) == 1 else torch.cat(found, 2)


class NotKept(Kept):
    """A map that is written and never read: whoever needs rows of it makes these anew."""

    def append(self, images: Images, first: int, band: Tensor) -> None:
        """Nothing."""


class _InOnePiece(Kept):
    """A map that lies in one piece: bands of an image are there once they were written."""

    def __init__(self) -> None:
        super().__init__()
        self.there: set[int] = set()

    def has(self, images: Images) -> bool:
        return images.start in self.there


class InPlace(_InOnePiece):
    """A map in one piece of memory. Whoever uses it up writes rows of another map of its shape over those that were read.

    Args:
        shape: Of the map [N, C, rows, ...].
        start: The number of its first image.
    """

    def __init__(self, shape: Sequence[int], start: int) -> None:
        super().__init__()
        self.shape, self.start = tuple(shape), start
        self.whole: Tensor | None = None  # made with the first rows, in their layout

    def append(self, images: Images, first: int, band: Tensor) -> None:
        if self.whole is None:
            layout = CHANNELS_LAST[band.ndim] if is_channels_last(band) else torch.contiguous_format
            self.whole = torch.empty(self.shape, dtype=band.dtype, device=band.device, memory_format=layout)
        self.there.add(images.start)
        self._of(images)[:, :, first : first + band.shape[2]] = band

    def rows(self, images: Images, first: int, last: int, spend: bool) -> Tensor:
        return self._of(images)[:, :, first:last]

    def _of(self, images: Images) -> Tensor:
        assert self.whole is not None
        return self.whole[images.start - self.start : images.stop - self.start]


class Written(_InOnePiece):
    """A raw map that lies where the output of the row will: rows of it are activated in their places.

    Args:
        y: That memory.
    """

    def __init__(self, y: Whole) -> None:
        super().__init__()
        self.y = y

    def append(self, images: Images, first: int, band: Tensor) -> None:
        self.there.add(images.start)
        self.y.write(images, first, band)

    def rows(self, images: Images, first: int, last: int, spend: bool) -> Tensor:
        return self.y.rows(images, first, last, None)


class Asked:
    """Memory for the gradient of an input, made when a pass first asks for it.

    Args:
        x: The input.
    """

    def __init__(self, x: Whole) -> None:
        self.x = x
        self.made: Whole | None = None

    def __call__(self) -> Whole:
        if self.made is None:
            self.made = self.x.like()
        return self.made

    def give(self, memory: Tensor | None) -> None:
        """Memory to be taken, if it is like that of the input, or of a map that it is made of."""
        if memory is not None and self.made is None:
            self.made = self.x.taking(memory)

    def gradients(self) -> Grads:
        """Of the parts of the input; None of each if no pass asked."""
        return [None] * len(self.x.parts) if self.made is None else [*self.made.parts]


class Rows:
    """Rows of a map that move on: the upper ones go, others come below.

    They stay in one piece of memory where they fit into it; whoever has been given them is done with them before the next ones
    come.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None
        self._memory: Tensor | None = None

    def put(self, values: Tensor) -> Tensor:
        """These alone; they are not written to."""
        self.values, self._memory = values, None
        return values

    def move_on(self, drop: int, more: Tensor | None) -> Tensor:
        """Those that are here without so many of the upper ones, and more below."""
        assert self.values is not None
        left = self.values.shape[2] - drop
        count = left + (0 if more is None else more.shape[2])
        fits = self._memory is not None and count <= self._memory.shape[2]
        if more is None:
            self.values = self.values[:, :, drop:]
            self._memory = None
        elif not fits or not 0 < left <= _MOVES * drop:
            self.values = self._memory = torch.cat((self.values[:, :, drop:], more), 2)
        else:
            assert self._memory is not None
            for row in range(0, left, drop):  # from top to bottom, without an overlap
                end = min(row + drop, left)
                self._memory[:, :, row:end] = self._memory[:, :, row + drop : end + drop]
            self._memory[:, :, left:count] = more
            self.values = self._memory[:, :, :count]
        return self.values


_MOVES = 4  # the most copies in which rows move


class Sliding:
    """Rows that are made in order, and let go of once no later call can ask for them."""

    def __init__(self) -> None:
        self.first = self.last = 0
        self.held = Rows()

    def rows(self, first: int, last: int, make: Callable[[int, int], Tensor]) -> Tensor:
        """These rows; none before `first` will be asked for again.

        Args:
            first: The first row.
            last: The row after the last one.
            make: Makes rows that follow those made before. Not kept: its owner, in a circle, would keep all rows.
        """
        if self.held.values is None or first >= self.last:
            self.held = Rows()
            self.first, self.last = first, last
            return self.held.put(make(first, last))
        if first > self.first or last > self.last:
            more = make(self.last, last) if last > self.last else None
            self.held.move_on(first - self.first, more)
            self.first, self.last = first, max(last, self.last)
        return self.peek(first, last)

    def peek(self, first: int, last: int) -> Tensor:
        """Rows that are here."""
        assert self.held.values is not None
        return self.held.values[:, :, first - self.first : last - self.first]
