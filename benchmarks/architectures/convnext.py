"""ConvNeXt-T with a UPerNet head.

Sources: Liu et al., A ConvNet for the 2020s, arXiv:2201.03545; Xiao et al., Unified Perceptual Parsing,
arXiv:1807.10221. Drop path is left out.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.architectures.layers import conv_norm_act, upsampled


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of a map [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise 7 x 7, then two layers on channels last, scaled, and a shortcut."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(c, c, 7, padding=3, groups=c)
        self.norm = nn.LayerNorm(c, eps=1e-6)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c)
        self.gamma = nn.Parameter(1e-6 * torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Four stages; a norm before each map that goes to the head."""

    def __init__(
        self, depths: Sequence[int] = (3, 3, 9, 3), widths: Sequence[int] = (96, 192, 384, 768)
    ) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), LayerNorm2d(widths[0], 1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for a, b in pairwise(widths):
            self.downsample_layers.append(nn.Sequential(LayerNorm2d(a, 1e-6), nn.Conv2d(a, b, 2, 2)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(c) for _ in range(depth))) for depth, c in zip(depths, widths, strict=True)
        )
        self.norms = nn.ModuleList(LayerNorm2d(c, 1e-6) for c in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for down, stage, norm in zip(self.downsample_layers, self.stages, self.norms, strict=True):
            x = stage(down(x))
            maps.append(norm(x))
        return maps


class UPerHead(nn.Module):
    """Pyramid pooling of the last map, a feature pyramid of all, joined at the first one's size."""

    def __init__(
        self, widths: Sequence[int], classes: int, c: int = 512, scales: Sequence[int] = (1, 2, 3, 6)
    ) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), *conv_norm_act(widths[-1], c, 1)) for scale in scales
        )
        self.bottleneck = conv_norm_act(widths[-1] + len(scales) * c, c)
        self.lateral = nn.ModuleList(conv_norm_act(width, c, 1) for width in widths[:-1])
        self.smooth = nn.ModuleList(conv_norm_act(c, c) for _ in widths[:-1])
        self.join = conv_norm_act(len(widths) * c, c)
        self.head = nn.Conv2d(c, classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        last = maps[-1]
        laterals = [conv(x) for conv, x in zip(self.lateral, maps[:-1], strict=True)]
        laterals.append(
            self.bottleneck(torch.cat([last, *(upsampled(p(last), last) for p in self.pools)], 1))
        )
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + upsampled(laterals[i], laterals[i - 1])
        outs = [conv(x) for conv, x in zip(self.smooth, laterals[:-1], strict=True)] + [laterals[-1]]
        outs = [outs[0], *(upsampled(x, outs[0]) for x in outs[1:])]
        return self.head(F.dropout2d(self.join(torch.cat(outs, 1)), 0.1, self.training))  # type: ignore[no-any-return]


class ConvNeXtUPerNet(nn.Module):
    """At a stride of 4, upsampled to the size of the images."""

    def __init__(self, classes: int = 150) -> None:
        super().__init__()
        self.backbone = ConvNeXt()
        self.decode_head = UPerHead((96, 192, 384, 768), classes)

    def forward(self, images: Tensor) -> Tensor:
        return upsampled(self.decode_head(self.backbone(images)), images)
