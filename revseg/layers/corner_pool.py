"""Max pools of 2 x 2 that tell in which corner each maximum was, and the way back.

A corner is a byte where PyTorch's indices take eight, and putting values back into their corners is
deterministic, as PyTorch's own unpooling is not. A square at an odd border has what there is of it, so a side of
n pixels becomes ceil(n / 2).

In an export for any size everything is said by indices that follow from the size, as arithmetic: the graph then
holds for odd and for even sides, where a slice or a padding would fix what the example had.

Source: Badrinarayanan, Kendall and Cipolla, SegNet, arXiv:1511.00561, section 3.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg.layers.images import crop, is_size_open


def pool_with_corners(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each 2 x 2 square, and in which corner it was.

    Args:
        x: A map [N, C, H, W].

    Returns:
        The maxima [N, C, ceil(H / 2), ceil(W / 2)], and their corners 0 to 3, row by row, uint8; of equal
        values the first.
    """
    if is_size_open(x):
        return _open_pool(x)
    pooled, indices = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
    width = x.shape[-1]
    rows, columns = (indices // width % 2).byte(), (indices % width % 2).byte()
    return pooled, 2 * rows + columns


def unpool(x: Tensor, corners: Tensor, size: Sequence[int]) -> Tensor:
    """Each value in its corner of a square, zeros elsewhere.

    Args:
        x: Values [N, C, h, w].
        corners: As from `pool_with_corners`, of the same shape.
        size: H and W, each twice as many as h and w, or one less.

    Returns:
        The map [N, C, H, W].
    """
    if is_size_open(x):
        return _open_unpool(x, corners, size)
    places = torch.arange(4, dtype=torch.uint8, device=x.device).view(4, 1, 1)
    squares = torch.where(corners.unsqueeze(2) == places, x.unsqueeze(2), 0.0)  # [N, C, 4, h, w]
    return crop(F.pixel_shuffle(squares.flatten(1, 2), 2), size)


def _open_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    height, width = x.shape[-2:]
    firsts = [2 * torch.arange((length + 1) // 2, device=x.device) for length in (height, width)]
    rows, columns = (
        (first, (first + 1).clamp(max=length - 1))
        for first, length in zip(firsts, (height, width), strict=True)
    )  # the last square of an odd side has its only row or column twice
    four = [x.index_select(-2, row).index_select(-1, column) for row in rows for column in columns]
    pooled = torch.maximum(torch.maximum(four[0], four[1]), torch.maximum(four[2], four[3]))
    corner = torch.full_like(pooled, 3, dtype=torch.uint8)
    for i in (2, 1, 0):
        corner = torch.where(four[i] == pooled, torch.full_like(corner, i), corner)
    return pooled, corner


def _open_unpool(x: Tensor, corners: Tensor, size: Sequence[int]) -> Tensor:
    rows, columns = (torch.arange(length, device=x.device) for length in size)

    def enlarged(each: Tensor) -> Tensor:
        return each.index_select(-2, rows // 2).index_select(-1, columns // 2)

    here = (rows % 2 * 2)[:, None] + columns % 2  # [H, W]
    return torch.where(enlarged(corners.int()) == here, enlarged(x), 0.0)
