"""The class of the largest upsampled score by PyTorch's own operations: some rows of the result at a time.

Those rows and what is made of them stay in the cache of a core. The rows of the source that they read are interpolated
along x in one call, and each row of the result is a mixture of two of them; where the source has the size of the result
there is nothing to interpolate.

Letters: C classes, h w size of the scores, H W size of the result; K rows of the source, R rows of the result.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg.kernels.cpu.argmax import first_max
from revseg.kernels.interpolation import Axis, axis
from revseg.kernels.shapes import has_values

ROWS_BYTES = 2**19  # of the scores of some rows; two such maps exist at a time


def argmax(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Class indices [N, H, W], uint8, for logits [N, C, h, w]."""
    height, width = size
    dtype = torch.promote_types(logits.dtype, torch.float32)
    labels = torch.empty((len(logits), height, width), dtype=torch.uint8, device=logits.device)
    down = axis(logits.shape[2], height, align_corners, dtype)
    count = max(1, ROWS_BYTES // (logits.shape[1] * width * dtype.itemsize))
    tops = range(0, height, count)
    for image, result in zip(logits.to(dtype), labels, strict=True):
        for top in tops if has_values(logits) else tops[:1]:
            rows = slice(top, min(top + count, height))
            scores = (
                image[:, rows]
                if image.shape[1:] == result.shape
                else _mixed(image, rows, down, width, align_corners)
            )
            result[rows] = first_max(scores, scores.amax(dim=0, keepdim=True))
    return labels


def _mixed(image: Tensor, rows: slice, down: Axis, width: int, align_corners: bool) -> Tensor:
    """Rows of the upsampled scores [C, R, W] of one image [C, h, w]."""
    low, high = down.low[rows], down.high[rows]
    first = int(low[0])
    source = image[:, first : int(high[-1]) + 1]
    across = F.interpolate(source, width, mode="linear", align_corners=align_corners)  # [C, K, W]
    low_weight, high_weight = (
        torch.tensor(weight[rows, None], device=image.device)
        for weight in (down.low_weight, down.high_weight)
    )
    if low[0] == low[-1]:
        return (across[:, -1:] * high_weight).addcmul_(across[:, :1], low_weight)
    below, above = (across.index_select(1, torch.tensor(i - first, device=image.device)) for i in (low, high))
    return above.mul_(high_weight).addcmul_(below, low_weight)
