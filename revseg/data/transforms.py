"""Transforms of an image together with its label map, on bytes.

A transform is called with an image [3, H, W] and a label [H, W], both uint8, and returns both.
Randomness comes from torch's default generator, which a DataLoader seeds in each worker.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg.data.base import Pair, Transform

IGNORE = 255


class Compose:
    """Applies transforms one after the other."""

    def __init__(self, transforms: Sequence[Transform]):
        self.transforms = tuple(transforms)

    def __call__(self, image: Tensor, label: Tensor) -> Pair:
        for transform in self.transforms:
            image, label = transform(image, label)
        return image, label


class Resize:
    """Resizes to (H, W): the image bilinear and antialiased, the label by nearest pixel."""

    def __init__(self, size: tuple[int, int]):
        self.size = check_size(size)

    def __call__(self, image: Tensor, label: Tensor) -> Pair:
        return _resized(image, label, self.size)


class RandomHorizontalFlip:
    """Mirrors left and right with probability p."""

    def __init__(self, p: float = 0.5):
        if not 0 <= p <= 1:
            raise ValueError(f"expected a probability in [0, 1], got {p}")
        self.p = p

    def __call__(self, image: Tensor, label: Tensor) -> Pair:
        if float(torch.rand(())) >= self.p:
            return image, label
        return image.flip(-1), label.flip(-1)


class RandomScaleCrop:
    """Resizes by a random factor, then cuts a random window.

    Where the resized image is smaller than the window, black is added on the right and below,
    and the label there is 255.

    Args:
        size: (H, W) of the window.
        scales: The lowest and the highest factor.
    """

    def __init__(self, size: tuple[int, int], scales: tuple[float, float] = (0.5, 2.0)):
        self.size = check_size(size)
        if not 0 < scales[0] <= scales[1]:
            raise ValueError(f"expected scales 0 < lowest <= highest, got {scales}")
        self.scales = scales

    def __call__(self, image: Tensor, label: Tensor) -> Pair:
        scale = float(torch.empty(()).uniform_(*self.scales))
        height, width = (max(1, round(side * scale)) for side in label.shape)
        image, label = _resized(image, label, (height, width))
        missing = (0, max(0, self.size[1] - width), 0, max(0, self.size[0] - height))
        image, label = F.pad(image, missing), F.pad(label, missing, value=IGNORE)
        top, left = (
            int(torch.randint(side - window + 1, ()))
            for side, window in zip(label.shape, self.size, strict=True)
        )
        rows, columns = slice(top, top + self.size[0]), slice(left, left + self.size[1])
        return image[:, rows, columns].contiguous(), label[rows, columns].contiguous()


class PhotometricJitter:
    """Changes brightness, contrast and gamma, by one table of 256 bytes for each channel.

    Args:
        brightness: The highest shift, as a share of the full range.
        contrast: The highest change of the factor around the middle grey.
        gamma: The highest change of the exponent.
        colour: The highest change of the factor of each channel on its own.
    """

    def __init__(
        self, brightness: float = 0.1, contrast: float = 0.2, gamma: float = 0.2, colour: float = 0.05
    ):
        for name, value in (("contrast", contrast), ("gamma", gamma), ("colour", colour)):
            if not 0 <= value < 1:
                raise ValueError(f"expected a {name} change in [0, 1), got {value}")
        if brightness < 0:
            raise ValueError(f"expected a brightness change of at least 0, got {brightness}")
        self.brightness, self.contrast, self.gamma, self.colour = brightness, contrast, gamma, colour

    def __call__(self, image: Tensor, label: Tensor) -> Pair:
        shift, contrast, gamma = (torch.rand(3) * 2 - 1).unbind()
        channels = 1 + (torch.rand(3, 1) * 2 - 1) * self.colour
        levels = torch.linspace(0, 1, 256) ** (1 + gamma * self.gamma)
        levels = 0.5 + (levels - 0.5) * (1 + contrast * self.contrast) + shift * self.brightness
        table = (levels * channels * 255).round().clamp(0, 255).to(torch.uint8)  # [3, 256]
        return torch.stack([row[channel.int()] for row, channel in zip(table, image, strict=True)]), label


def check_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size, if it is a pair (H, W) of at least one pixel each."""
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"expected a size (H, W) of at least one pixel each, got {size}")
    return size[0], size[1]


def _resized(image: Tensor, label: Tensor, size: tuple[int, int]) -> Pair:
    if tuple(label.shape) == size:
        return image, label
    # in floats: on bytes of one row or column torch 2.13 fails with an internal error
    smooth = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    image = smooth.round().clamp(0, 255).to(torch.uint8)
    label = F.interpolate(label[None, None], size, mode="nearest-exact")[0, 0]
    return image, label
