"""A map as a matrix, and the rows of it that go through several operations together.

A block, at most `BLOCK` values for each thread of a CPU, goes through all operations before the
next one, so that what lies between stays in the cache and never becomes a map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor

BLOCK = 1 << 16  # values for each thread of a CPU, 256 KiB in float32
BLOCK_ELSEWHERE = 1 << 25  # few launches count more than the cache
_LANES = 16  # values of the widest vector registers, in float32


class Matrix:
    """A map [N, C, H, W] as a matrix.

    Contiguous maps have a row for each channel of each image, or several if a channel is large;
    maps in channels_last have a row for each pixel, and a column for each channel.
    """

    def __init__(self, u: Tensor) -> None:
        self.images, self.channels, height, self.width = u.shape
        self.by_row = u.is_contiguous() or not u.is_contiguous(memory_format=torch.channels_last)
        limit = BLOCK * torch.get_num_threads() if u.device.type == "cpu" else BLOCK_ELSEWHERE
        self.parts = 1  # rows of one channel of one image
        if self.by_row:
            while height * self.width // self.parts > limit and height * self.width % (2 * self.parts) == 0:
                self.parts *= 2
            self.data = u.view(self.images * self.channels * self.parts, -1)
        else:
            self.data = u.permute(0, 2, 3, 1).view(-1, self.channels)
        self.fold = self._folded()
        self.step = max(1, limit // max(1, self.data.shape[1]))
        self.dim = 1 if self.by_row else 0  # what a sum by channel adds up
        self.dtype = torch.promote_types(u.dtype, torch.float32)
        self.direct = self.dtype == u.dtype

    def _folded(self) -> int:
        """How many neighbouring pixels in channels_last stand side by side, so that few channels fill a vector register."""
        fold = _LANES // math.gcd(self.channels, _LANES) if self.channels < _LANES else 1
        return fold if self.width % fold == 0 else 1

    def blocks(self) -> Sequence[Tensor]:
        return self._cut(self.data)

    def _cut(self, rows: Tensor, dim: int = 0) -> Sequence[Tensor]:
        """As blocks; a call less where there is one."""
        return (rows,) if rows.shape[dim] <= self.step else torch.split(rows, self.step, dim)

    def scratch(self) -> Iterator[Tensor]:
        """Memory for one block, cut to the size of each; every block gets the same."""
        rows, columns = self.data.shape
        memory = torch.empty((min(self.step, rows), columns), dtype=self.dtype, device=self.data.device)
        whole, rest = divmod(rows, self.step)
        yield from repeat(memory, whole)
        if rest:
            yield memory[:rest]

    def one_block(self, count: int) -> None:
        """Memory as every block takes it, for tensors without values: taken once, where its peak is counted."""
        assert [next(self.scratch()) for _ in range(count)]

    def spread(self, vectors: Tensor) -> Iterator[Sequence[Tensor]]:
        """Values for each channel [K, C], for each block: K columns, or K single rows."""
        if not self.by_row:
            return repeat(vectors.to(self.dtype)[:, None].unbind(), len(self.blocks()))
        return (block.unbind() for block in self._cut(self._columns(vectors), 1))

    def _columns(self, vectors: Tensor) -> Tensor:
        """Values for each channel [K, C], for each row [K, R, 1]."""
        count, rows = len(vectors), len(self.data)
        shape = count, self.images, self.channels, self.parts
        return vectors.to(self.dtype)[:, None, :, None].expand(shape).reshape(count, rows, 1)

    def whole(self) -> Tensor:
        """The map in one piece, whose sums over dim 1 are short enough for its dtype.

        [R, K]; or [N * H, W / fold, fold * C].
        """
        if self.by_row:
            return self.data
        return self.data.view(-1, self.width // self.fold, self.fold * self.channels)

    def along(self, vectors: Tensor) -> Sequence[Tensor]:
        """Values for each channel [K, C], for `whole()`: K times [R, 1], or [1, 1, fold * C]."""
        if self.by_row:
            return self._columns(vectors).unbind()
        return vectors.to(self.dtype).repeat(1, self.fold)[:, None, None].unbind()

    def added_whole(self, sums: Tensor) -> Tensor:
        """Sums of `whole()` over dim 1, [K, R] or [K, N * H, fold * C], as sums [K, C]."""
        return self.added([sums]) if self.by_row else sums.view(len(sums), -1, self.channels).sum(1)

    def merged_whole(self, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] from those of `whole()` over dim 1, [R] or [N * H, fold * C]."""
        if self.by_row:
            return self.merged([mean], [square])
        each, square = (v.view(-1, self.channels).mT for v in (mean, square))
        return _merged(each, square, self.width // self.fold)

    def added(self, sums: list[Tensor]) -> Tensor:
        """Sums [K, rows or C] of every block as sums [K, C]."""
        if not self.by_row:
            return torch.stack(sums).sum(0)
        return _one(sums, 1).view(-1, self.images, self.channels, self.parts).sum((1, 3))

    def merged(self, means: list[Tensor], squares: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] from those of every row, or of every block."""
        if self.by_row:
            shape = (self.images, self.channels, self.parts)
            each, square = (_one(v).view(shape).transpose(0, 1).flatten(1) for v in (means, squares))
            return _merged(each, square, self.data.shape[1])  # [C, rows]
        each, square = torch.stack(means, 1), torch.stack(squares, 1)  # [C, blocks]
        counts = torch.full_like(each[0], self.step)
        counts[-1] = len(self.data) - self.step * (len(means) - 1)
        return _merged(each, square, counts)


def _one(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _merged(each: Tensor, square: Tensor, counts: Tensor | int) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] of parts: their means and squared distances from these [C, parts], and sizes [parts]."""
    if isinstance(counts, int):  # the same of all
        mean = each.mean(1)
        squares = torch.add(square, (each - mean[:, None]).square_(), alpha=counts)
        return mean, squares.sum(1).div_(counts * each.shape[1])
    total = counts.sum()
    mean = (each * counts).sum(1) / total
    return mean, (square + (each - mean[:, None]).square() * counts).sum(1) / total
