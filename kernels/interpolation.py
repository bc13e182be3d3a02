"""Where bilinear interpolation reads along one axis, and with which weights: for any two sizes those of `F.interpolate`, to the bit."""

from typing import Any, NamedTuple

import numpy as np
import torch


class Axis(NamedTuple):
    """For each output along one axis: its two sources and their weights."""

    low: np.ndarray
    high: np.ndarray
    low_weight: np.ndarray
    high_weight: np.ndarray


def axis(size: int, outputs: int, align_corners: bool, dtype: torch.dtype) -> Axis:
    """Two sources and their weights for each output, as `F.interpolate` has them in this type."""
    number: Any = np.float64 if dtype == torch.float64 else np.float32
    i = np.arange(outputs)
    if align_corners:
        scale = number(size - 1) / number(outputs - 1) if outputs > 1 else number(0)
        position = scale * i.astype(number)
    else:
        scale = number(size) / number(outputs)
        # The product is not rounded before the subtraction, which torch's compilers fuse.
        position = (np.float64(scale) * (i + 0.5) - 0.5).astype(number).clip(min=0)
    low = position.astype(np.int64).clip(max=size - 1)
    high_weight = (position - low.astype(number)).clip(0, 1)
    return Axis(low, (low + 1).clip(max=size - 1), 1 - high_weight, high_weight)
