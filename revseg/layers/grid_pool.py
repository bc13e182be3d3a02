"""The means of a map over a grid of cells, for graphs of any size.

`F.adaptive_avg_pool2d` cannot be exported for a size that is not known: its cells depend on it. There a cell's
mean is a product with a matrix of shares, which follows from the size by arithmetic.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg.layers.images import is_size_open


def grid_means(x: Tensor, cells: int) -> Tensor:
    """[N, C, H, W] to [N, C, cells, cells], as `F.adaptive_avg_pool2d`: cells may overlap by a row or a column."""
    if not is_size_open(x):
        return F.adaptive_avg_pool2d(x, cells)
    rows, columns = (_shares(length, cells, x) for length in x.shape[-2:])
    return rows @ x @ columns.T


class GridMeans(nn.Module):
    """`grid_means` as a module.

    Args:
        cells: On a side.
    """

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, x: Tensor) -> Tensor:
        return grid_means(x, self.cells)


def _shares(length: int, cells: int, like: Tensor) -> Tensor:
    """How much of each of `length` pixels is in the mean of each cell [cells, length]."""
    cell = torch.arange(cells, device=like.device)[:, None]
    first, last = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
    pixel = torch.arange(length, device=like.device)
    inside = (pixel >= first) & (pixel < last)
    return (inside / (last - first)).to(like.dtype)
