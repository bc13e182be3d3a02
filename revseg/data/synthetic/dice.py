"""Random choices that are the same on every platform and with every version of numpy.

numpy promises the raw words of a bit generator, not what its distributions make of them. So
everything here is built on the words of PCG64 with arithmetic that IEEE 754 fixes.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Colour = tuple[int, int, int]

_BLOCK = 512


class Dice:
    """A stream of random numbers, named by integers: the same integers give the same stream."""

    def __init__(self, *name: int):
        self._source = np.random.PCG64(np.random.SeedSequence(name))
        self._words: list[int] = []

    def word(self) -> int:
        """64 random bits."""
        if not self._words:
            self._words = self._source.random_raw(_BLOCK).tolist()
        return self._words.pop()

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * ((self.word() >> 11) * 2.0**-53)

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.word() % (high - low + 1)

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return self.uniform(0, 1) < p

    def choice(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.integer(0, len(options) - 1)]

    def tint(self, colour: Colour, spread: int) -> Colour:
        """The colour, lighter or darker by up to `spread` and a little changed in each channel."""
        word, third = self.word(), spread // 3
        shift = (word & 0xFFFF) % (2 * spread + 1) - spread
        r = colour[0] + shift + (word >> 16 & 0xFFFF) % (2 * third + 1) - third
        g = colour[1] + shift + (word >> 32 & 0xFFFF) % (2 * third + 1) - third
        b = colour[2] + shift + (word >> 48) % (2 * third + 1) - third
        return max(0, min(255, r)), max(0, min(255, g)), max(0, min(255, b))

    def noise(self, height: int, width: int) -> npt.NDArray[np.uint8]:
        """Random bytes [height, width]."""
        words = self._source.random_raw((height * width + 7) // 8)
        return words.astype("<u8").view(np.uint8)[: height * width].reshape(height, width)
