"""The decoder of ESPNet: from maps at 1/2, 1/4 and 1/8 to logits at full size.

Source: Mehta, Rastegari, Caspi, Shapiro and Hajishirzi, ESPNet, arXiv:1803.06815, figure 4.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revseg.layers.blocks import BNAct, ConvBNAct
from revseg.layers.images import crop
from revseg.layers.stack import Stack
from revseg.layers.upsample_conv import DoublingConv2d
from revseg.models.espnet_esp import DILATIONS, ESP

Wrap = Callable[[nn.Module], nn.Module]


class Decoder(nn.Module):
    """From what the encoder has at 1/2, 1/4 and 1/8 to logits at full size.

    Args:
        channels: Of the three maps.
        num_classes: C, the number of classes.
        block: Called with the layers of one size, for what stands in their place.
        last: The same for those that make the logits.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, block: Wrap, last: Wrap) -> None:
        super().__init__()
        half, quarter, eighth = channels
        c = max(num_classes, len(DILATIONS))  # ESP shares them out
        reduce = nn.Conv2d(eighth, c, 1, bias=False)
        self.level3 = block(Stack(reduce, nn.BatchNorm2d(c, eps=1e-3), _doubling(c, c)))
        self.level2 = block(Quarter(quarter, c))
        self.level1 = last(Half(half, c, num_classes))

    def forward(self, half: Tensor, quarter: Tensor, eighth: Tensor) -> Tensor:
        return self.level1(self.level2(self.level3(eighth), quarter), half)  # type: ignore[no-any-return]

    def features(self, half: Tensor, quarter: Tensor, eighth: Tensor) -> Tensor:
        """What the classes are read from."""
        level1: Any = self.level1
        return level1.features(self.level2(self.level3(eighth), quarter), half)  # type: ignore[no-any-return]

    def classified(self, features: Tensor) -> Tensor:
        """The logits of features."""
        level1: Any = self.level1
        return level1.classify[1](features)  # type: ignore[no-any-return]


class Quarter(nn.Module):
    """Two maps at 1/4 become one of C channels at 1/2.

    Args:
        in_channels: Channels of the encoder's map.
        channels: C, those of the decoder's.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        c = channels
        self.project = nn.Conv2d(in_channels, c, 1, bias=False)
        last = nn.BatchNorm2d(c, eps=1e-3), nn.PReLU(c)
        self.merge = Stack(BNAct(2 * c), ESP(2 * c, c), _doubling(c, c), *last)

    def forward(self, x: Tensor, quarter: Tensor) -> Tensor:
        both = torch.cat((self.project(quarter), crop(x, quarter.shape[-2:])), 1)
        return self.merge(both)  # type: ignore[no-any-return]


class Half(nn.Module):
    """Two maps at 1/2 become logits at full size.

    Args:
        in_channels: Channels of the encoder's map.
        channels: Those of the decoder's.
        num_classes: C, the number of classes.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        conv = ConvBNAct(channels + in_channels, channels)
        self.classify = Stack(conv, DoublingConv2d(channels, num_classes, bias=False))

    def forward(self, x: Tensor, half: Tensor) -> Tensor:
        return self.classify(torch.cat((crop(x, half.shape[-2:]), half), 1))  # type: ignore[no-any-return]

    def features(self, x: Tensor, half: Tensor) -> Tensor:
        """What the logits are made of, at 1/2."""
        return self.classify[0](torch.cat((crop(x, half.shape[-2:]), half), 1))  # type: ignore[no-any-return]


def _doubling(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2, bias=False)
