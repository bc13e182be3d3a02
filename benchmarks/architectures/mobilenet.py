"""MobileNetV2 at a stride of 16 with ASPP.

Sources: Sandler et al., MobileNetV2, arXiv:1801.04381; Chen et al., Rethinking Atrous Convolution, arXiv:1706.05587.
"""

from torch import Tensor, nn

from benchmarks.architectures.layers import ASPP, upsampled

SETTINGS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 1),
    (6, 320, 1, 1),
)


def _layer(
    c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> list[nn.Module]:
    padding = dilation * (size // 2)
    conv = nn.Conv2d(c_in, c_out, size, stride, padding, dilation, groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True)]


class InvertedResidual(nn.Module):
    """1 x 1 up, depthwise 3 x 3, 1 x 1 down, and a shortcut where the shape stays."""

    def __init__(self, c_in: int, c_out: int, stride: int, expand: int, dilation: int) -> None:
        super().__init__()
        c = c_in * expand
        layers = _layer(c_in, c, 1) if expand > 1 else []
        layers += _layer(c, c, 3, stride, c, dilation)
        self.conv = nn.Sequential(*layers, nn.Conv2d(c, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetASPP(nn.Module):
    """The last two strides of 2 are one, with dilated convolutions instead."""

    def __init__(self, classes: int = 19, width: int = 256) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Sequential(*_layer(3, 32, 3, 2))]
        c_in = 32
        for i, (expand, c, count, stride) in enumerate(SETTINGS):
            for k in range(count):
                blocks.append(InvertedResidual(c_in, c, stride if k == 0 else 1, expand, 2 if i > 4 else 1))
                c_in = c
        blocks.append(nn.Sequential(*_layer(c_in, 1280, 1)))
        self.features = nn.Sequential(*blocks)
        self.aspp = ASPP(1280, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        return upsampled(self.head(self.aspp(self.features(images))), images)
