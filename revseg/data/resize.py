"""The size of a pair: images are smoothed, labels keep their ids."""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size, if it is a pair (H, W) of at least one pixel each."""
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"expected a size (H, W) of at least one pixel each, got {size}")
    return size[0], size[1]


def resized(image: Tensor, label: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The pair at another size: the image bilinear and antialiased, the label by nearest pixel.

    Args:
        image: [3, H, W], uint8.
        label: [H, W], uint8.
        size: (H, W) of the result.
    """
    if tuple(label.shape) == size:
        return image, label
    # in floats: on bytes of one row or column torch 2.13 fails with an internal error
    smooth = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    image = smooth.round().clamp(0, 255).to(torch.uint8)
    label = F.interpolate(label[None, None], size, mode="nearest-exact")[0, 0]
    return image, label
