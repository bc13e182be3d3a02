"""DenseNet-121 as a fully convolutional network.

Source: Huang et al., Densely Connected Convolutional Networks, arXiv:1608.06993; the head as in torchvision's FCN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.architectures.layers import FCNHead, upsampled


class DenseLayer(nn.Module):
    """Norm, ReLU, 1 x 1, norm, ReLU, 3 x 3 on all maps so far."""

    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        c = 4 * growth
        self.norm1, self.relu1 = nn.BatchNorm2d(c_in), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(c_in, c, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(c), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c, growth, 3, padding=1, bias=False)

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(maps, 1))))
        y: Tensor = self.conv2(self.relu2(self.norm2(x)))
        return y


class DenseBlock(nn.ModuleList):
    """Every layer reads what all before it made."""

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self:
            maps.append(layer(maps))
        return torch.cat(maps, 1)


class DenseNetFCN(nn.Module):
    """A stride of 32, one head, upsampled.

    Args:
        classes: C of the logits [N, C, H, W].
        depths: Layers of the blocks.
        growth: Channels of a layer.
        width: Channels of the stem.
    """

    def __init__(
        self, classes: int = 21, depths: Sequence[int] = (6, 12, 24, 16), growth: int = 32, width: int = 64
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        rows: list[nn.Module] = [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
        c = width
        for i, depth in enumerate(depths):
            rows.append(DenseBlock(DenseLayer(c + k * growth, growth) for k in range(depth)))
            c += depth * growth
            if i < len(depths) - 1:
                norm = nn.BatchNorm2d(c), nn.ReLU(inplace=True)
                rows.append(nn.Sequential(*norm, nn.Conv2d(c, c // 2, 1, bias=False), nn.AvgPool2d(2, 2)))
                c //= 2
        self.features = nn.Sequential(*rows, nn.BatchNorm2d(c))
        self.head = FCNHead(c, classes)

    def forward(self, images: Tensor) -> Tensor:
        return upsampled(self.head(self.features(images).relu()), images)
