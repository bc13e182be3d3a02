"""Which samples an epoch takes, in which order, and which of them belong to which process.

The order follows from the seed and the epoch alone. The processes take turns in it, so a batch of
each of them together is a batch of one process that is as many times as large, and a run that
continues in the middle of an epoch may do so with another number of processes.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from revseg.data.base import seed_of


class EpochSampler(Sampler[int]):
    """The indices of the samples that one process takes in an epoch.

    Args:
        length: The number of samples of the data set.
        seed: Of the order.
        rank: The number of this process.
        world: The number of processes.
        start: How many samples of the epoch all processes together have taken already.
        shuffle: Another order every epoch; else that of the data set.
        even: Leave out the last samples that not every process can have one of. Else some processes
            take one more: every sample exactly once, as an evaluation needs it.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        *,
        shuffle: bool = True,
        even: bool = True,
    ):
        if length < 1:
            raise ValueError(f"expected a length of at least 1, got {length}")
        if not 0 <= rank < world:
            raise ValueError(f"expected a rank in [0, {world}), got {rank}")
        if even and length < world:
            raise ValueError(f"expected at least one sample for each of {world} processes, got {length}")
        self.length, self.seed, self.rank, self.world = length, seed, rank, world
        self.shuffle, self.even = shuffle, even
        self.set_epoch(0, start)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Goes to an epoch of which `start` samples are already taken, by all processes together."""
        if not 0 <= start <= self.length:
            raise ValueError(f"expected a start in [0, {self.length}], got {start}")
        self.epoch, self.start = epoch, start

    def order(self) -> list[int]:
        """The indices of the whole epoch, of all processes."""
        if not self.shuffle:
            return list(range(self.length))
        words = np.random.PCG64(seed_of(self.seed, self.epoch)).random_raw(self.length)
        return [int(index) for index in np.argsort(words, kind="stable")]

    def __len__(self) -> int:
        return len(range(self.start + self.rank, self._end(), self.world))

    def __iter__(self) -> Iterator[int]:
        return iter(self.order()[self.start + self.rank : self._end() : self.world])

    def _end(self) -> int:
        left_out = (self.length - self.start) % self.world if self.even else 0
        return self.length - left_out
