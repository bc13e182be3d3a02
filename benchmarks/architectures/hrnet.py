"""HRNetV2-W18: four resolutions side by side, exchanged after every four blocks.

Source: Sun et al., High-Resolution Representations for Labeling Pixels and Regions, arXiv:1904.04514.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.architectures.layers import conv_norm, conv_norm_act, upsampled
from benchmarks.architectures.resnet import Bottleneck


class BasicBlock(nn.Module):
    """Two 3 x 3 layers and a shortcut."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        out: Tensor = self.relu(y)
        return out


class Exchange(nn.Module):
    """Four blocks at every resolution, then each resolution gets the sum of all."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(c) for _ in range(4))) for c in widths)
        self.fuse = nn.ModuleList(
            nn.ModuleList(self._path(widths, j, i) for j in range(len(widths))) for i in range(len(widths))
        )
        self.relu = nn.ReLU(inplace=True)

    @staticmethod
    def _path(widths: Sequence[int], j: int, i: int) -> nn.Module:
        """From resolution j to resolution i."""
        if j == i:
            return nn.Identity()
        if j > i:
            return conv_norm(widths[j], widths[i], 1)
        steps = [conv_norm_act(widths[j], widths[j], 3, 2) for _ in range(i - j - 1)]
        return nn.Sequential(
            *(layer for step in steps for layer in step), *conv_norm(widths[j], widths[i], 3, 2)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        fused = []
        for i, paths in enumerate(self.fuse):
            y = paths[0](maps[0]) if i else maps[0]
            for j in range(1, len(maps)):
                x = paths[j](maps[j])
                y = y + (upsampled(x, maps[i]) if j > i else x)
            fused.append(self.relu(y))
        return fused


class HRNet(nn.Module):
    """Maps of all four resolutions, joined at a stride of 4, and a head of one layer.

    Args:
        classes: C of the logits [N, C, H, W].
        width: Channels of the highest resolution; each further has twice as many.
        modules: Exchanges of the stages with 2, 3 and 4 resolutions.
    """

    def __init__(self, classes: int = 19, width: int = 18, modules: Sequence[int] = (1, 4, 3)) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm_act(3, 64, 3, 2), *conv_norm_act(64, 64, 3, 2))
        self.layer1 = nn.Sequential(Bottleneck(64, 64), *(Bottleneck(256, 64) for _ in range(3)))
        self.transitions, self.stages = nn.ModuleList(), nn.ModuleList()
        before = [256]
        for i, count in enumerate(modules):
            widths = [width << k for k in range(i + 2)]
            self.transitions.append(self._transition(before, widths))
            self.stages.append(nn.ModuleList(Exchange(widths) for _ in range(count)))
            before = widths
        total = sum(before)
        self.head = nn.Sequential(*conv_norm_act(total, total, 1), nn.Conv2d(total, classes, 1))

    @staticmethod
    def _transition(before: Sequence[int], widths: Sequence[int]) -> nn.ModuleList:
        paths: list[nn.Module] = []
        for a, b in zip(before, widths, strict=False):
            paths.append(nn.Identity() if a == b else conv_norm_act(a, b))
        return nn.ModuleList([*paths, conv_norm_act(before[-1], widths[-1], 3, 2)])

    def forward(self, images: Tensor) -> Tensor:
        maps = [self.layer1(self.stem(images))]
        for transition, stage in zip(self.transitions, self.stages, strict=True):
            new = transition[-1](maps[-1])
            maps = [path(x) for path, x in zip(transition, maps, strict=False)]
            maps.append(new)
            for exchange in stage:
                maps = exchange(maps)
        joined = torch.cat([maps[0], *(upsampled(x, maps[0]) for x in maps[1:])], 1)
        return upsampled(self.head(joined), images)
