"""The residual encoder-decoder of nnU-Net, for volumes.

Source: Isensee et al., nnU-Net Revisited, arXiv:2404.09556: the ResEnc L of the 3-D full resolution configuration.
Instance norm, leaky ReLU, one convolution a decoder level.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def _layer(c_in: int, c_out: int, stride: int = 1, act: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv3d(c_in, c_out, 3, stride, 1), nn.InstanceNorm3d(c_out, affine=True)]
    return nn.Sequential(*layers, *([nn.LeakyReLU(inplace=True)] if act else []))


class _Residual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = _layer(c_in, c_out, stride), _layer(c_out, c_out, act=False)
        skip: list[nn.Module] = [nn.AvgPool3d(stride, stride)] if stride > 1 else []
        if c_in != c_out:
            skip += [nn.Conv3d(c_in, c_out, 1, bias=False), nn.InstanceNorm3d(c_out, affine=True)]
        self.skip, self.act = nn.Sequential(*skip), nn.LeakyReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.conv2(self.conv1(x)) + self.skip(x))
        return y


class ResidualEncoderUNet(nn.Module):
    """Residual stages on the way down, one layer a level on the way up.

    Args:
        c_in: Channels of the volumes.
        classes: C of the logits [N, C, D, H, W].
        widths: Channels of the stages.
        depths: Blocks of the stages.
    """

    def __init__(
        self,
        c_in: int = 1,
        classes: int = 3,
        widths: Sequence[int] = (32, 64, 128, 256, 320, 320),
        depths: Sequence[int] = (1, 3, 4, 6, 6, 6),
    ) -> None:
        super().__init__()
        self.stem = _layer(c_in, widths[0])
        stages, before = [], widths[0]
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            first = _Residual(before, width, 2 if i else 1)
            stages.append(nn.Sequential(first, *(_Residual(width, width) for _ in range(depth - 1))))
            before = width
        self.stages = nn.ModuleList(stages)
        pairs = list(pairwise(widths))[::-1]
        self.raised = nn.ModuleList(nn.ConvTranspose3d(low, high, 2, 2) for high, low in pairs)
        self.up = nn.ModuleList(_layer(2 * high, high) for high, _ in pairs)
        self.head = nn.Conv3d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, kept = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            kept.append(x)
        x = kept.pop()
        for raised, level in zip(self.raised, self.up, strict=True):
            x = level(torch.cat((raised(x), kept.pop()), 1))
        logits: Tensor = self.head(x)
        return logits
