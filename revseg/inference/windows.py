"""Prediction by overlapping windows, for images larger than the device's memory.

A row of windows at a time, from top to bottom. The scores of neighbours are blended where they overlap, at the
stride of the network, and only the scores of the present row of windows exist. Pixels are read window by window and
labels come out strip by strip, so neither the image nor its labels need be in memory as a whole.

Letters: s the stride of the network; H W size of the image; h w its size in scores, ceil(H / s).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg.ops import upsample_argmax

STRIP = 1 << 17  # pixels of a strip of labels, about: their scores at full size are C floats each

Span = tuple[int, int]  # first and last (exclusive)


class Rows(Protocol):
    """An image that is read by parts."""

    height: int
    width: int

    def read(self, rows: Span, columns: Span) -> Tensor:
        """These pixels [3, n, m], uint8 or already normalised."""


class TensorRows:
    """The parts of an image [3, H, W] that is in memory."""

    def __init__(self, image: Tensor) -> None:
        self.image = image
        self.height, self.width = image.shape[1:]

    def read(self, rows: Span, columns: Span) -> Tensor:
        return self.image[:, slice(*rows), slice(*columns)]


@dataclass(frozen=True)
class Windows:
    """Windows of an image.

    Args:
        height: Of a window, in pixels; rounded up to the stride of the network.
        width: The same across.
        overlap: The share of a window that it has in common with the next, in [0, 0.9].

    Raises:
        ValueError: If a size is below 1, or the overlap out of its range.
    """

    height: int
    width: int
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(f"expected windows of at least 1 x 1, got {self.height} x {self.width}")
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(f"expected an overlap in [0, 0.9], got {self.overlap}")

    @classmethod
    def of(cls, size: tuple[int, int] | None, overlap: float) -> Windows | None:
        """The windows of two flags, None for the whole image."""
        return None if size is None else cls(*size, overlap)


def predict_rows(
    scores: Callable[[Tensor], Tensor], rows: Rows, stride: int, windows: Windows
) -> Iterator[Tensor]:
    """The labels of an image, strip by strip from its top: [n, W], uint8.

    An image whose size is no multiple of the stride is continued by its last row and column.

    Args:
        scores: Takes a window [1, 3, n, m] to its scores [1, C, n / s, m / s].
        rows: The image.
        stride: s.
        windows: Their size and overlap.
    """
    down = _starts(-(-rows.height // stride), -(-windows.height // stride), windows.overlap)
    across = _starts(-(-rows.width // stride), -(-windows.width // stride), windows.overlap)
    labels = _Labels(rows.height, rows.width, stride)
    held: Tensor | None = None  # weighted scores of the rows that the next windows add to [C, n, w]
    weights: Tensor | None = None  # [n, w]
    for k, (first, last) in enumerate(down):
        following = down[k + 1][0] if k + 1 < len(down) else last
        total, weight = _blended(scores, rows, (first, last), across, stride)
        if held is not None and weights is not None:
            total[:, : held.shape[1]] += held
            weight[: len(weights)] += weights
        ready = following - first
        yield from labels.of(total[:, :ready].div_(weight[:ready]), last=k + 1 == len(down))
        held, weights = total[:, ready:].clone(), weight[ready:].clone()
        del total, weight  # not beside those of the next row


def _blended(
    scores: Callable[[Tensor], Tensor], rows: Rows, down: Span, across: list[Span], s: int
) -> tuple[Tensor, Tensor]:
    """The weighted scores of a row of windows [C, n, w], and the sum of their weights [n, w]."""
    total: Tensor | None = None
    weight: Tensor | None = None
    n = down[1] - down[0]
    for first, last in across:
        found = scores(_padded(rows, down, (first, last), s)[None])[0].float()
        if found.shape[1:] != (n, last - first):
            raise ValueError(
                f"expected scores at stride {s}, {n} x {last - first}, got {list(found.shape[1:])}"
            )
        tent = _tent(found.shape[1], found.device)[:, None] * _tent(found.shape[2], found.device)
        if total is None or weight is None:
            total = found.new_zeros(len(found), found.shape[1], across[-1][1])
            weight = found.new_zeros(found.shape[1], across[-1][1])
        total[:, :, first:last].addcmul_(found, tent)
        weight[:, first:last] += tent
    assert total is not None
    assert weight is not None
    return total, weight


class _Labels:
    """Labels from scores that come strip by strip; a strip needs one row of its neighbours."""

    def __init__(self, height: int, width: int, stride: int) -> None:
        self.height, self.width, self.stride = height, width, stride
        self.waiting: Tensor | None = (
            None  # scores [C, n, w]: one row that is done, if any is, then one to be done
        )
        self.done = 0  # rows of pixels

    def of(self, scores: Tensor, last: bool) -> Iterator[Tensor]:
        """Strips of at most about `STRIP` pixels for scores [C, n, w], which are the last ones or not."""
        n = max(1, STRIP // (scores.shape[2] * self.stride**2))
        parts = torch.split(scores, n, 1)
        for i, part in enumerate(parts):
            yield from self._strip(part, last and i + 1 == len(parts))

    def _strip(self, scores: Tensor, last: bool) -> Iterator[Tensor]:
        begun = self.done > 0
        scores = scores if self.waiting is None else torch.cat((self.waiting, scores), 1)
        count, s = scores.shape[1], self.stride
        size = (count * s, scores.shape[2] * s)
        if count > 1 + begun or last:
            labels = upsample_argmax(scores[None], size)[0]
            rows = labels[s if begun else 0 : len(labels) if last else len(labels) - s, : self.width]
            rows = rows[: self.height - self.done]
            self.done += len(rows)
            yield rows
            scores = scores[:, -2:]
        self.waiting = scores.clone()


def _starts(length: int, window: int, overlap: float) -> list[Span]:
    """First and last (exclusive) of each window along an axis of so many scores, evenly spread."""
    window = min(window, length)
    if window == length:
        return [(0, length)]
    step = max(1, round(window * (1 - overlap)))
    count = -(-(length - window) // step) + 1
    return [(start, start + window) for start in (i * (length - window) // (count - 1) for i in range(count))]


def _tent(n: int, device: torch.device) -> Tensor:
    """Weights that fall to the borders of a window [n]."""
    i = torch.arange(n, device=device, dtype=torch.float32)
    return torch.minimum(i + 1, n - i)


def _padded(rows: Rows, down: Span, across: Span, stride: int) -> Tensor:
    """The pixels of a window of scores, continued to multiples of the stride [3, n * s, m * s]."""
    (top, bottom), (left, right) = ((first * stride, last * stride) for first, last in (down, across))
    window = rows.read((top, min(bottom, rows.height)), (left, min(right, rows.width)))
    below, beside = bottom - top - window.shape[1], right - left - window.shape[2]
    if not below and not beside:
        return window
    whole = window[None] if window.is_floating_point() else window[None].float()
    return F.pad(whole, (0, beside, 0, below), mode="replicate")[0].to(window.dtype)
