"""Transforms of an image together with its label map, on bytes: where and how large.

A transform is called with an image [3, H, W] and a label [H, W], both uint8, and with the generator it
draws from; it returns both. The generator follows from the seed, the epoch and the index of the sample,
so nothing depends on which process loads it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from revseg.data.base import Pair, Transform
from revseg.data.resize import check_size, resized

IGNORE = 255


class Compose:
    """Applies transforms one after the other."""

    def __init__(self, transforms: Sequence[Transform]):
        self.transforms = tuple(transforms)

    def __call__(self, image: Tensor, label: Tensor, generator: Generator, /) -> Pair:
        for transform in self.transforms:
            image, label = transform(image, label, generator)
        return image, label


class Resize:
    """Resizes to (H, W): the image bilinear and antialiased, the label by nearest pixel."""

    def __init__(self, size: tuple[int, int]):
        self.size = check_size(size)

    def __call__(self, image: Tensor, label: Tensor, generator: Generator, /) -> Pair:
        return resized(image, label, self.size)


class RandomHorizontalFlip:
    """Mirrors left and right with probability p."""

    def __init__(self, p: float = 0.5):
        self.p = check_probability(p)

    def __call__(self, image: Tensor, label: Tensor, generator: Generator, /) -> Pair:
        if uniform(generator) >= self.p:
            return image, label
        return image.flip(-1), label.flip(-1)


class RandomScaleCrop:
    """Resizes by a random factor, then cuts a random window.

    Where the resized image is smaller than the window, black is added on the right and below,
    and the label there is 255.

    Args:
        size: (H, W) of the window.
        scales: The lowest and the highest factor.
        classes: Classes to look for, as ids. Windows are then laid around a pixel of one of them:
            every class that the sample has is as likely as the others, however few its pixels are.
        p: How often that is done; else the window lies anywhere.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scales: tuple[float, float] = (0.5, 2.0),
        *,
        classes: Sequence[int] = (),
        p: float = 0.5,
    ):
        self.size = check_size(size)
        if not 0 < scales[0] <= scales[1]:
            raise ValueError(f"expected scales 0 < lowest <= highest, got {scales}")
        if any(not 0 <= each < IGNORE for each in classes):
            raise ValueError(f"expected classes in [0, {IGNORE}), got {tuple(classes)}")
        self.scales, self.classes, self.p = scales, tuple(classes), check_probability(p)

    def __call__(self, image: Tensor, label: Tensor, generator: Generator, /) -> Pair:
        scale = uniform(generator, *self.scales)
        height, width = (max(1, round(side * scale)) for side in label.shape)
        image, label = resized(image, label, (height, width))
        missing = (0, max(0, self.size[1] - width), 0, max(0, self.size[0] - height))
        image, label = F.pad(image, missing), F.pad(label, missing, value=IGNORE)
        centre = self._rare_pixel(label, generator)
        top, left = (
            _start(side, window, generator, middle)
            for side, window, middle in zip(label.shape, self.size, centre, strict=True)
        )
        rows, columns = slice(top, top + self.size[0]), slice(left, left + self.size[1])
        return image[:, rows, columns].contiguous(), label[rows, columns].contiguous()

    def _rare_pixel(self, label: Tensor, generator: Generator) -> tuple[int | None, int | None]:
        """The place of a pixel of one of the classes; None where the window may lie anywhere."""
        if not self.classes or uniform(generator) >= self.p:
            return None, None
        counts = torch.bincount(label.flatten(), minlength=256)
        present = [each for each in self.classes if counts[each]]
        if not present:
            return None, None
        chosen = present[integer(generator, 0, len(present) - 1)]
        places = (label == chosen).flatten().nonzero()
        row, column = divmod(int(places[integer(generator, 0, len(places) - 1)]), label.shape[1])
        return row, column


def uniform(generator: Generator, low: float = 0.0, high: float = 1.0) -> float:
    """A number in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def integer(generator: Generator, low: int, high: int) -> int:
    """An integer in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def check_probability(p: float) -> float:
    """The number, if it is a probability."""
    if not 0 <= p <= 1:
        raise ValueError(f"expected a probability in [0, 1], got {p}")
    return p


def _start(side: int, window: int, generator: Generator, middle: int | None) -> int:
    """Where a window begins: anywhere, or so that a pixel lies in its middle half."""
    if middle is None:
        return integer(generator, 0, side - window)
    offset = integer(generator, window // 4, max(window // 4, window - 1 - window // 4))
    return min(max(0, middle - offset), side - window)
