"""What the scores of a map ought to say, and how much each pixel counts."""

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """What the scores ought to say, and how much it counts: all arguments but the scores."""

    labels: Tensor  # [N, H, W], uint8 or int64
    ignore_index: int
    weight: Tensor | None  # [C], of the type of the scores
    smoothing: float
    counts: Tensor | None  # [C, C], int64: pixels by true and by predicted class, added to

    def at(self, images: slice, rows: slice) -> "Targets":
        """Those of some rows of some images."""
        return self._replace(labels=self.labels[images, rows])


def equal(labels: Tensor, value: int) -> Tensor:
    """Where labels equal a value, which need not be one of their type."""
    if labels.dtype == torch.uint8 and not 0 <= value <= 255:
        return torch.zeros_like(labels, dtype=torch.bool)  # compared, the value would wrap around
    return labels == value
