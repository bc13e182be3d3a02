"""Test-time augmentation: scores averaged over sizes of the image and its mirror image.

Probabilities are averaged at the stride of the network, not at full size: C floats a pixel of the image would be the
largest tensor of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg.layers.images import normalize_images


@dataclass(frozen=True)
class Augmentation:
    """What is averaged over.

    Args:
        scales: Sizes of the image, as factors.
        flip: Whether each is taken mirrored too.

    Raises:
        ValueError: If there is no scale, or one is not in [0.1, 10].
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if not self.scales or not all(0.1 <= scale <= 10 for scale in self.scales):
            raise ValueError(f"expected scales between 0.1 and 10, got {self.scales}")

    @classmethod
    def of(cls, scales: tuple[float, ...], flip: bool) -> Augmentation | None:
        """The augmentation of two flags, None for the image as it is."""
        return None if scales == (1.0,) and not flip else cls(scales, flip)


def scores_of(
    network: Callable[[Tensor], Tensor], image: Tensor, stride: int, augmentation: Augmentation
) -> Tensor:
    """The mean probabilities [1, C, h, w] at the stride of the network, float32.

    Args:
        network: Takes images [1, 3, H, W] to logits [1, C, h, w].
        image: [1, 3, H, W], uint8 or already normalised.
        stride: H / h, rounded up.
        augmentation: What to average over.
    """
    height, width = image.shape[2:]
    size = (-(-height // stride), -(-width // stride))
    total: Tensor | None = None
    for scale in augmentation.scales:
        scaled = image if scale == 1 else _scaled(image, scale)
        for mirrored in (False, True) if augmentation.flip else (False,):
            logits = network(scaled.flip(3) if mirrored else scaled).float()
            logits = logits.flip(3) if mirrored else logits
            if logits.shape[2:] != size:
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            probabilities = logits.softmax(1)
            total = probabilities if total is None else total.add_(probabilities)
    assert total is not None
    return total.div_(len(augmentation.scales) * (1 + augmentation.flip))


def _scaled(image: Tensor, scale: float) -> Tensor:
    size = [max(1, round(scale * each)) for each in image.shape[2:]]
    floats = F.interpolate(normalize_images(image), size, mode="bilinear", antialias=scale < 1)
    return floats.to(image.dtype if image.is_floating_point() else torch.float32)
