"""Images at the door of a network.

Images reach a model as bytes and are normalised where they are used: four times less to move
and to keep than float32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg import ops
from revseg.engine.tracing import is_traced, refuse_symbol


@dataclass(frozen=True)
class Normalization:
    """How bytes become the floats that a network computes with: (bytes / 255 - mean) / std.

    Args:
        mean: Of each channel, bytes counted from 0 to 1.
        std: Deviation of each channel.
        flipped: The channels come as RGB and go in as BGR, as OpenCV reads files; `mean` and `std` are of BGR.

    Raises:
        ValueError: If there is not one of both for each channel, or a deviation is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    flipped: bool = False

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(
                f"expected a mean and a positive deviation for each channel, got {self.mean} and {self.std}"
            )

    @classmethod
    def of_channels(cls, channels: int) -> "Normalization":
        """ImageNet's for three channels; for others, of which nothing is known, mean 1/2 and deviation 1/4."""
        return IMAGENET if channels == 3 else cls((0.5,) * channels, (0.25,) * channels)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Normalization":
        """That of `dataclasses.asdict`, also after it was JSON."""
        return cls(tuple(values["mean"]), tuple(values["std"]), bool(values.get("flipped", False)))

    @classmethod
    def of_bytes(cls, mean: Sequence[float], std: Sequence[float], flipped: bool = False) -> "Normalization":
        """(bytes - mean) / std, with numbers as they are common where bytes are not divided by 255."""
        return cls(tuple(m / 255 for m in mean), tuple(s / 255 for s in std), flipped)

    def __call__(self, images: Tensor) -> Tensor:
        """Images with the mean and deviation taken out.

        Args:
            images: Bytes [N, C, H, W], uint8, or images already normalised, of a float type, which
                are returned as they are.

        Returns:
            Images [N, C, H, W]: float32 from bytes, on a CPU in channels_last, in which its convolutions
            need no copies of their maps; else the argument itself.

        Raises:
            ValueError: If the shape is not [N, C, H, W].
            TypeError: If the images are neither uint8 nor float.
        """
        refuse_symbol(images)
        channels = len(self.mean)
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"expected images [N, {channels}, H, W], got shape {list(images.shape)}")
        if images.is_floating_point():
            return images
        if images.dtype != torch.uint8:
            raise TypeError(f"expected images of dtype uint8 or float, got {images.dtype}")
        mean, std = (
            torch.tensor(values, device=images.device).view(channels, 1, 1) * 255
            for values in (self.mean, self.std)
        )
        ordered = images.flip(1) if self.flipped else images
        floats = ordered.float().sub_(mean).div_(std)
        plain = torch.compiler.is_compiling() or not ops.kernels_are_on() or is_traced([images])
        return floats if plain or images.device.type != "cpu" else ops.relaid(floats, torch.channels_last)


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
normalize_images = IMAGENET


def of_each_image(
    fn: Callable[[Tensor], Tensor], images: Tensor, normalize: Normalization = IMAGENET
) -> Tensor:
    """`fn` of the normalised images; bytes are normalised one image at a time.

    Args:
        fn: Takes floats [n, C, H, W] to a tensor [n, ...], each image for itself.
        images: Bytes or floats [N, C, H, W], as `normalize` takes them.
        normalize: Makes floats of them.
    """
    refuse_symbol(images)
    if images.is_floating_point():
        return fn(normalize(images))
    return torch.cat([fn(normalize(image)) for image in torch.split(images, 1)])


def image_pyramid(images: Tensor, depth: int, normalize: Normalization = IMAGENET) -> list[Tensor]:
    """The images at 1/2, 1/4, ... of their size, which small networks feed in again further on.

    Average pools of 3 x 3 with stride 2, one after another, that count their padding as zeros.

    Args:
        images: Bytes or floats [N, C, H, W], as `normalize` takes them.
        depth: How many sizes.
        normalize: Makes floats of them.

    Returns:
        Images [N, C, h, w], float, h = ceil(H / 2) and so on.
    """
    halve = partial(F.avg_pool2d, kernel_size=3, stride=2, padding=1)
    pyramid = [of_each_image(halve, images, normalize)]
    while len(pyramid) < depth:
        pyramid.append(halve(pyramid[-1]))
    return pyramid


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The top left corner [N, C, H, W] of a map, for a size (H, W).

    What was halved to ceil(size / 2) and doubled again is one row or column too large where the size
    was odd.
    """
    if not is_size_open(x):
        return x[..., : size[0], : size[1]]
    for dim, length in zip((-2, -1), size, strict=True):  # a slice would fix whether the size is odd
        x = x.index_select(dim, torch.arange(length, device=x.device))
    return x


def even_sides(x: Tensor) -> Tensor:
    """A map with a row or a column of zeros where a side is odd, for what reads squares of 2 x 2.

    Where the size is open, always with both: a step of two leaves out what is too many.
    """
    bottom, right = (1, 1) if is_size_open(x) else (x.shape[-2] % 2, x.shape[-1] % 2)
    return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


def is_size_open(x: Tensor) -> bool:
    """The map is part of an export for any height or width."""
    return not all(isinstance(length, int) for length in x.shape[-2:])
