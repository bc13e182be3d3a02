"""Two networks that are not ours: a U-Net, and ResNet-50 as a fully convolutional network.

Written as anyone writes them, without a line of our library in training: what is done to them from outside is the
question. Both take images [N, 3, H, W], uint8 or float, and return logits at a stride of their own.

Sources: Ronneberger et al., U-Net, arXiv:1505.04597 (with batch norm, and padding that keeps the size); He et al., Deep
Residual Learning, arXiv:1512.03385; Long et al., Fully Convolutional Networks, arXiv:1411.4038.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg.layers.images import normalize_images


def conv_norm_act(c_in: int, c_out: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
    """Convolution, batch norm, ReLU."""
    conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


def double(c_in: int, c_out: int) -> nn.Sequential:
    """Two layers of a U-Net's level."""
    return nn.Sequential(*conv_norm_act(c_in, c_out), *conv_norm_act(c_out, c_out))


class UNet(nn.Module):
    """Four halvings and back, maps of the way down joined to those of the way up.

    Args:
        num_classes: C of the logits [N, C, H, W].
        widths: Channels of the levels, the full size first.
    """

    def __init__(self, num_classes: int, widths: Sequence[int] = (32, 64, 128, 256, 512)) -> None:
        super().__init__()
        ins = [3, *widths[:-1]]
        self.down = nn.ModuleList(double(a, b) for a, b in zip(ins, widths, strict=True))
        pairs = list(pairwise(widths))[::-1]
        self.raise_ = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, 2) for narrow, wide in pairs)
        self.up = nn.ModuleList(double(2 * narrow, narrow) for narrow, _ in pairs)
        self.classifier = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        x, kept = normalize_images(images), []
        for i, level in enumerate(self.down):
            x = level(F.max_pool2d(x, 2) if i else x)
            kept.append(x)
        kept.pop()
        for raised, level in zip(self.raise_, self.up, strict=True):
            x = level(torch.cat([kept.pop(), raised(x)], 1))
        logits: Tensor = self.classifier(x)
        return logits


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 and a shortcut."""

    def __init__(self, c_in: int, c: int, stride: int = 1) -> None:
        super().__init__()
        last = nn.Conv2d(c, 4 * c, 1, bias=False), nn.BatchNorm2d(4 * c)
        self.body = nn.Sequential(*conv_norm_act(c_in, c, 1), *conv_norm_act(c, c, 3, stride), *last)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or c_in != 4 * c:
            conv = nn.Conv2d(c_in, 4 * c, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(4 * c))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.body(x))


class ResNet50FCN(nn.Module):
    """ResNet-50, a head of one 3 x 3 layer, logits at a stride of 32.

    Args:
        num_classes: C of the logits [N, C, H / 32, W / 32].
        depths: Blocks of the four stages.
        width: Channels of the stem.
    """

    def __init__(self, num_classes: int, depths: Sequence[int] = (3, 4, 6, 3), width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm_act(3, width, 7, 2), nn.MaxPool2d(3, 2, 1))
        stages, c_in = [], width
        for i, depth in enumerate(depths):
            c = width << i
            blocks = [Bottleneck(c_in, c, 1 if i == 0 else 2)]
            blocks += [Bottleneck(4 * c, c) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            c_in = 4 * c
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(*conv_norm_act(c_in, c_in // 4), nn.Conv2d(c_in // 4, num_classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(self.stem(normalize_images(images))))
        return logits
