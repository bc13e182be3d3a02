"""The class of the highest score, as a byte: that of every pixel of a piece of a map."""

import torch
from torch import Tensor

MOST_CLASSES = 255  # 255 itself is what labels use for "ignored"


def first_max(scores: Tensor, highest: Tensor) -> Tensor:
    """The first of at most 255 classes whose score is the highest.

    Several times faster than `argmax`, which is not vectorized along this dimension.

    Args:
        scores: Scores [n, C, R, W].
        highest: Their maximum over the classes [n, 1, R, W].

    Returns:
        Class indices [n, R, W], uint8.
    """
    classes = torch.arange(scores.shape[1], dtype=torch.uint8, device=scores.device)[:, None, None]
    return torch.where(scores < highest, MOST_CLASSES, classes).amin(dim=1)
