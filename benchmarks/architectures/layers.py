"""Layers that several of the networks have."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm_act(c_in: int, c_out: int, size: int = 3, stride: int = 1, **options: Any) -> nn.Sequential:
    """Convolution that keeps the size, batch norm, ReLU."""
    dilation = options.get("dilation", 1)
    padding = dilation * (size - 1) // 2
    conv = nn.Conv2d(c_in, c_out, size, stride, padding, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


def conv_norm(c_in: int, c_out: int, size: int = 3, stride: int = 1, **options: Any) -> nn.Sequential:
    """Convolution and batch norm."""
    return conv_norm_act(c_in, c_out, size, stride, **options)[:2]


def upsampled(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the size of another map."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


class FCNHead(nn.Sequential):
    """A 3 x 3 layer of a quarter of the channels, dropout, a classifier."""

    def __init__(self, c_in: int, classes: int) -> None:
        layer = conv_norm_act(c_in, c_in // 4)
        super().__init__(*layer, nn.Dropout(0.1), nn.Conv2d(c_in // 4, classes, 1))


class ASPP(nn.Module):
    """Parallel dilated convolutions and the mean of the map, joined by a 1 x 1 layer.

    Source: Chen et al., Rethinking Atrous Convolution, arXiv:1706.05587.
    """

    def __init__(
        self, c_in: int, c_out: int, rates: tuple[int, ...] = (12, 24, 36), separable: bool = False
    ) -> None:
        super().__init__()

        def branch(rate: int) -> nn.Module:
            if not separable:
                return conv_norm_act(c_in, c_out, dilation=rate)
            deep = nn.Conv2d(c_in, c_in, 3, padding=rate, dilation=rate, groups=c_in, bias=False)
            return nn.Sequential(deep, *conv_norm_act(c_in, c_out, 1))

        branches = [conv_norm_act(c_in, c_out, 1), *(branch(rate) for rate in rates)]
        self.branches = nn.ModuleList(branches)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm_act(c_in, c_out, 1))
        self.project = nn.Sequential(
            *conv_norm_act(c_out * (len(rates) + 2), c_out, 1), nn.Dropout(0.5 if not separable else 0.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        maps = [branch(x) for branch in self.branches]
        maps.append(upsampled(self.pool(x), x))
        return self.project(torch.cat(maps, 1))
