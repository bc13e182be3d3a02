"""What every data set of the library is: pairs of an image and its label map, by index.

Images and labels stay bytes here. A data set says how to load a pair; indexing, the size, the
names of the samples and the transform are the same for all.

A sample is a function of the seed, the epoch and the index: its transform draws from a generator
made of these three alone. So the samples are the same with any number of workers and processes,
and a run that stopped in the middle of an epoch finds them again.
"""

import inspect
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from revseg.data.classes import ClassTable
from revseg.data.resize import check_size, resized

Pair = tuple[Tensor, Tensor]


class Transform(Protocol):
    """Takes an image [3, H, W] and its label [H, W], both uint8, to another pair."""

    def __call__(self, image: Tensor, label: Tensor, generator: Generator, /) -> Pair:
        """The changed pair; whatever is random in it is drawn from the generator."""
        ...


class SegmentationDataset(Dataset[Pair]):
    """Images [3, H, W] with label maps [H, W], both uint8.

    Args:
        classes: The table of the classes.
        names: A name for each sample, without folder and ending; names of output files.
        transform: Called with the image, the label and a generator for every sample.
        seed: Of what the transform draws.
        size: (H, W) of the samples before the transform; as they are stored by default.

    Attributes:
        epoch: Another epoch gives other random changes of the same samples.
    """

    def __init__(
        self,
        classes: ClassTable,
        names: Sequence[str],
        transform: Transform | None = None,
        *,
        seed: int = 0,
        size: tuple[int, int] | None = None,
    ):
        if seed < 0:
            raise ValueError(f"expected a seed of at least 0, got {seed}")
        self.classes = classes
        self.names = tuple(names)
        self.transform = check_transform(transform)
        self.seed = seed
        self.size = None if size is None else check_size(size)
        # in shared memory: worker processes that outlive an epoch see the next one
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the random changes of an epoch; to be called before a loader starts on it."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {index}")
        index %= len(self)
        image, label = self.sized(index)
        if self.transform is None:
            return image, label
        return self.transform(image, label, sample_generator(self.seed, self.epoch, index))

    def sized(self, index: int) -> Pair:
        """The image and the label of a sample at the size of the data set, before the transform."""
        image, label = self.load(index)
        return (image, label) if self.size is None else resized(image, label, self.size)

    def load(self, index: int) -> Pair:
        """The image and the label of a sample as they are stored, before the transform."""
        raise NotImplementedError

    def verify(self) -> None:
        """Finds quickly what is wrong with the samples, before a run is built on them.

        Raises:
            ValueError: If samples are missing or broken; the message names them.
        """

    def origin(self) -> dict[str, object]:
        """What all samples before the transform follow from, in types of JSON: the key of a cache."""
        raise NotImplementedError

    def sample_origin(self, index: int) -> object:
        """What a sample follows from besides `origin`, in types of JSON."""
        raise NotImplementedError


def sample_generator(seed: int, epoch: int, index: int) -> Generator:
    """The generator from which the transform of a sample draws."""
    return Generator().manual_seed(seed_of(seed, epoch, index))


def seed_of(*name: int) -> int:
    """A seed of 64 bits from integers, the same on every platform and with every version of numpy."""
    return int(np.random.SeedSequence(name).generate_state(1, np.uint64)[0])


def check_samples(samples: int | None) -> None:
    """Refuses a number of samples below one."""
    if samples is not None and samples < 1:
        raise ValueError(f"expected at least one sample, got {samples}")


def check_split(split: str, splits: Sequence[str], name: str) -> None:
    """Refuses a split that the data set does not have."""
    if split not in splits:
        raise ValueError(f"unknown split {split!r} of {name}; choose one of {', '.join(splits)}")


def check_transform(transform: Transform | None) -> Transform | None:
    """The transform, if it can be called with an image, a label and a generator.

    Raises:
        TypeError: If it cannot.
    """
    if transform is None:
        return None
    try:
        inspect.signature(transform).bind(None, None, None)
    except TypeError:
        raise TypeError(
            f"expected a transform of (image, label, generator), got {transform!r}; wrap one of (image, label) "
            "in revseg.data.TorchvisionTransform, one of (image=, mask=) in AlbumentationsTransform"
        ) from None
    except ValueError:
        pass  # a callable written in C, whose arguments nobody can know
    return transform
