"""The class of the highest score, as a byte: that of every pixel of a piece of a map."""

import torch
from torch import Tensor

MOST_CLASSES = 255  # 255 itself is what labels use for "ignored"


def first_max(scores: Tensor, highest: Tensor) -> Tensor:
    """The first of at most 255 classes whose score is the highest.

    Many times faster than `argmax`, which is not vectorized along this dimension; nor are comparisons whose results
    are bytes, so that all is done in the type of the scores.

    Args:
        scores: Scores [..., C, R, W], float32 or float64.
        highest: Their maximum over the classes [..., 1, R, W].

    Returns:
        Class indices [..., R, W], uint8.
    """
    classes = torch.arange(scores.shape[-3], dtype=scores.dtype, device=scores.device)[:, None, None]
    lower = torch.lt(scores, highest, out=torch.empty_like(scores))  # 1 where it is not the highest
    return torch.add(classes, lower, alpha=MOST_CLASSES, out=lower).amin(dim=-3).to(torch.uint8)
