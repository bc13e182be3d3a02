"""ResNet-50 at a stride of 8 with an FCN head, and at 16 with the decoder of DeepLabv3+.

Sources: He et al., Deep Residual Learning, arXiv:1512.03385; Long et al., Fully Convolutional Networks,
arXiv:1411.4038; Chen et al., Encoder-Decoder with Atrous Separable Convolution, arXiv:1802.02611. Blocks as in
torchvision: the stride is in the 3 x 3, one in-place ReLU is called three times.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.architectures.layers import ASPP, FCNHead, conv_norm, conv_norm_act, upsampled


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 and a shortcut."""

    def __init__(self, c_in: int, c: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv3, self.bn3 = nn.Conv2d(c, 4 * c, 1, bias=False), nn.BatchNorm2d(4 * c)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = conv_norm(c_in, 4 * c, 1, stride) if stride > 1 or c_in != 4 * c else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(y)
        return out


class ResNet(nn.Module):
    """ResNet-50 without its classifier; returns the maps of all four stages.

    Args:
        strides: Of the stages; where a stride is left out, convolutions are dilated.
        dilations: Of the stages.
        depths: Blocks of the stages.
        width: Channels of the stem.
    """

    def __init__(
        self,
        strides: Sequence[int] = (1, 2, 1, 1),
        dilations: Sequence[int] = (1, 1, 2, 4),
        depths: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        c_in, before = width, 1
        for i, (stride, dilation, depth) in enumerate(zip(strides, dilations, depths, strict=True)):
            c = width << i
            blocks = [Bottleneck(c_in, c, stride, before if stride == 1 else dilation)]
            blocks += [Bottleneck(4 * c, c, 1, dilation) for _ in range(depth - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            c_in, before = 4 * c, dilation
        self.channels = [4 * width << i for i in range(4)]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


class ResNetFCN(nn.Module):
    """The FCN of torchvision, without its second head."""

    def __init__(self, classes: int = 21) -> None:
        super().__init__()
        self.backbone = ResNet()
        self.classifier = FCNHead(self.backbone.channels[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return upsampled(self.classifier(self.backbone(images)[-1]), images)


class DeepLabV3Plus(nn.Module):
    """A stride of 16, ASPP, and a decoder that joins the map of the first stage."""

    def __init__(self, classes: int = 19, width: int = 256, low_width: int = 48) -> None:
        super().__init__()
        self.backbone = ResNet((1, 2, 2, 1), (1, 1, 1, 2))
        low, *_, high = self.backbone.channels
        self.aspp = ASPP(high, width, (6, 12, 18))
        self.low = conv_norm_act(low, low_width, 1)
        self.join = nn.Sequential(*conv_norm_act(width + low_width, width), *conv_norm_act(width, width))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        low, *_, high = self.backbone(images)
        low = self.low(low)
        x = self.join(torch.cat([low, upsampled(self.aspp(high), low)], 1))
        return upsampled(self.head(x), images)
