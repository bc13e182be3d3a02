"""U-Net for images and for volumes.

Sources: Ronneberger et al., U-Net, arXiv:1505.04597 (here with batch norm, and padding that keeps the size); Çiçek et
al., 3D U-Net, arXiv:1606.06650.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _double(conv: Any, norm: Any, c_in: int, c_middle: int, c_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in ((c_in, c_middle), (c_middle, c_out)):
        layers += [conv(a, b, 3, padding=1), norm(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class _Levels(nn.Module):
    """Down level by level, each after a pool; up, each behind a raised map joined to the one of its size."""

    down: nn.ModuleList
    raised: nn.ModuleList
    up: nn.ModuleList
    head: nn.Module
    pool: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for level in self.down:
            x = level(self.pool(x, 2) if kept else x)
            kept.append(x)
        x = kept.pop()
        for raised, level in zip(self.raised, self.up, strict=True):
            x = level(torch.cat([kept.pop(), raised(x)], 1))
        logits: Tensor = self.head(x)
        return logits


class UNet(_Levels):
    """Four halvings and back, maps of the way down joined to those of the way up.

    Args:
        classes: C of the logits [N, C, H, W].
        widths: Channels of the levels, the full size first.
    """

    pool = staticmethod(F.max_pool2d)

    def __init__(self, classes: int = 2, widths: Sequence[int] = (64, 128, 256, 512, 1024)) -> None:
        super().__init__()
        kinds = nn.Conv2d, nn.BatchNorm2d
        self.down = nn.ModuleList(_double(*kinds, a, b, b) for a, b in pairwise([3, *widths]))
        pairs = list(pairwise(widths))[::-1]
        self.raised = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, 2) for narrow, wide in pairs)
        self.up = nn.ModuleList(_double(*kinds, 2 * narrow, narrow, narrow) for narrow, _ in pairs)
        self.head = nn.Conv2d(widths[0], classes, 1)


class UNet3D(_Levels):
    """Three halvings; channels double before each, and a transposed convolution keeps them."""

    pool = staticmethod(F.max_pool3d)

    def __init__(self, classes: int = 3, c_in: int = 3, width: int = 32, levels: int = 4) -> None:
        super().__init__()
        kinds = nn.Conv3d, nn.BatchNorm3d
        outs = [2 * width << i for i in range(levels)]
        self.down = nn.ModuleList(_double(*kinds, a, b // 2, b) for a, b in pairwise([c_in, *outs]))
        self.raised = nn.ModuleList(nn.ConvTranspose3d(wide, wide, 2, 2) for wide in outs[:0:-1])
        pairs = list(pairwise(outs))[::-1]
        self.up = nn.ModuleList(_double(*kinds, narrow + wide, narrow, narrow) for narrow, wide in pairs)
        self.head = nn.Conv3d(outs[0], classes, 1)
