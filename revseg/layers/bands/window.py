"""Which rows of its input a row of a raw map follows from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """The rows that an operation reads: row r follows from `reach` rows of the input, from r * step - above on.

    Attributes:
        reach: How many rows one row reads.
        step: Rows of the input from one row to the next.
        above: Rows of the first window that lie above the map.
        below: How far the last window may reach below the map.
    """

    reach: int
    step: int
    above: int
    below: int

    @classmethod
    def of(
        cls, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> list[Window]:
        """Those of a convolution or a pool, one of each dimension, padded alike on both sides."""
        each = zip(kernel, stride, padding, dilation, strict=True)
        return [cls(d * (k - 1) + 1, s, p, p) for k, s, p, d in each]

    def height(self, height: int) -> int:
        """Rows that come of a map of so many."""
        return (height + self.above + self.below - self.reach) // self.step + 1

    def read(self, first: int, last: int) -> tuple[int, int]:
        """The rows that rows first to last (excluded) read; some may lie outside of the map."""
        return first * self.step - self.above, (last - 1) * self.step - self.above + self.reach

    def inside(self, first: int, last: int, height: int) -> tuple[int, int]:
        """Those of the rows that rows first to last (excluded) read which lie in a map of so many."""
        low, high = self.read(first, last)
        return max(low, 0), min(high, height)

    def readers(self, first: int, last: int, height: int) -> tuple[int, int]:
        """The rows, of so many, that read one of rows first to last (excluded) of the input."""
        start = -((self.reach - 1 - first - self.above) // self.step)
        stop = (last - 1 + self.above) // self.step + 1
        return min(max(start, 0), height), min(max(stop, 0), height)

    def finished(self, last: int) -> int:
        """The first row of the input that rows from `last` on may read."""
        return last * self.step - self.above
