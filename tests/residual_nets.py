"""Residual blocks and a ResNet as users have them, for the tests of `revseg.convert`."""

import torch
import torch.nn.functional as F
from torch import nn


class Bottleneck(nn.Module):
    """As in ResNet-50: 1 x 1, 3 x 3, 1 x 1, a projected shortcut where the shape changes, ReLU in place."""

    def __init__(self, channels, out, stride=1):
        super().__init__()
        inner = out // 4
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += shortcut
        return self.relu(out)


class ResNet(nn.Module):
    """Stem, two stages of bottlenecks, both maps out, as encoders of segmentation networks are."""

    def __init__(self, depths=(3, 4), width=16):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self.stage(8, width, 1, depths[0])
        self.layer2 = self.stage(width, 2 * width, 2, depths[1])
        self.fc = nn.Conv2d(2 * width, 5, 1)

    def stage(self, channels, out, stride, depth):
        return nn.Sequential(
            Bottleneck(channels, out, stride), *(Bottleneck(out, out) for _ in range(depth - 1))
        )

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x1 = self.layer1(x)
        return self.fc(self.layer2(x1)), x1


class NonBottleneck1D(nn.Module):
    """As in ERFNet: asymmetric pairs with biases, dropout, ReLU after the sum."""

    def __init__(self, channels, dropout=0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        self.conv2 = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1))
        self.bn, self.dropout = nn.BatchNorm2d(channels, eps=1e-3), nn.Dropout2d(dropout)

    def forward(self, x):
        return F.relu(self.dropout(self.bn(self.conv2(F.relu(self.conv1(x))))) + x)


class PreActivation(nn.Module):
    """x + F(x), nothing after the sum, and a layer scale, as in ConvNeXt."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, x):
        return x + self.gamma * self.conv(F.gelu(self.norm(x)))


class NormAfterSum(PreActivation):
    def forward(self, x):
        return self.norm(x + self.conv(x))


class Projected(PreActivation):
    """A shortcut with weights, though the shape is kept."""

    def forward(self, x):
        return self.conv(x) + x.mean(1, keepdim=True) * self.gamma


class WritesToItsInput(PreActivation):
    def forward(self, x):
        return x.relu_() + self.conv(x)


def row(block, depth=3, channels=8):
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), *(block(channels) for _ in range(depth)))


def images(*size, n=2, dtype=torch.float64):
    return torch.randn(n, 3, *size, dtype=dtype)
