"""DABNet: depth-wise asymmetric bottlenecks, 0.757 M parameters.

Three convolutions make 32 channels at 1/2 of the size. Two rows of bottlenecks follow, at 1/4 and
1/8. A bottleneck halves the channels by a 3 x 3 convolution, looks close by and far off with a pair of
depth-wise 3 x 1 and 1 x 3 convolutions each, the second pair dilated, adds both, and widens again by a
1 x 1 convolution; its input is added. The images, pooled, come in again before each row and before the
classifier; what enters a row is joined to what leaves it.

Source: Li, Yun, Kim and Kim, DABNet: Depth-wise Asymmetric Bottleneck for Real-time Semantic
Segmentation, arXiv:1907.11357, figures 2 and 3 and table 1.

The layers are those of the official code (github.com/Reagan1311/DABNet), except that its pools of
2 x 2 leave out the last row of an odd map, where they would not fit to the convolution beside them.
It takes the mean of the data set out of bytes and does not divide: `load_official` sees to that.
"""

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg.layers.blocks import BNAct, ConvBNAct, ImageConvBNAct, JoinedClassifier
from revseg.layers.images import Normalization, image_pyramid
from revseg.layers.stack import Stack
from revseg.models.network import Network
from revseg.models.official import renamed
from revseg.models.policy import Memory, MemoryPolicy


class DABNet(Network):
    """DABNet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, h, w].

    h = ceil(H / 8), w = ceil(W / 8).

    Args:
        num_classes: C, the number of classes.
        widths: Channels of the stem and the two rows, the last two even.
        dilations: Of the far pair of each bottleneck, for each row.
        in_channels: Of the images.
        memory: "least", "lowest", "balanced" or "fastest", or a policy, see `revseg.models.policy`.

    Raises:
        ValueError: If an argument is unknown or out of its range.
    """

    stride = 8
    official_normalizations: ClassVar = {  # the mean is taken out of BGR images, then these are turned to RGB
        19: Normalization.of_bytes((73.158325, 82.90902, 72.3924), (1.0, 1.0, 1.0)),
        11: Normalization.of_bytes((99.625404, 103.329834, 105.65775), (1.0, 1.0, 1.0)),
    }

    def __init__(
        self,
        num_classes: int = 19,
        *,
        widths: Sequence[int] = (32, 64, 128),
        dilations: Sequence[Sequence[int]] = ((2, 2, 2), (4, 4, 8, 8, 16, 16)),
        in_channels: int = 3,
        memory: Memory = "balanced",
    ) -> None:
        super().__init__(num_classes, in_channels)
        policy = MemoryPolicy.of(memory)
        _check(widths, dilations)
        w1, w2, w3 = widths

        def row(channels: int, dilations: Sequence[int]) -> nn.Module:
            return policy.stage(Stack(*(policy.block(Bottleneck(channels, d)) for d in dilations)))

        self.stem = policy.block(
            Stack(ImageConvBNAct(in_channels, w1, stride=2), ConvBNAct(w1, w1), ConvBNAct(w1, w1))
        )  # 1/2
        self.down1 = policy.block(Down(w1 + in_channels, w2))  # 1/4
        self.row1 = row(w2, dilations[0])
        self.down2 = policy.block(Down(2 * w2 + in_channels, w3))  # 1/8
        self.row2 = row(w3, dilations[1])
        self.head = policy.block(JoinedClassifier(2 * w3 + in_channels, num_classes))

    def logits(self, images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, C, h, w]
        half, quarter, eighth = image_pyramid(images, 3, self.normalization)
        x = self.down1(self.stem(images), half)
        x = self.down2(self.row1(x), x, quarter)
        return self.head(self.row2(x), x, eighth)  # type: ignore[no-any-return]

    @staticmethod
    def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a state dict of the official code by our names.

        Raises:
            ValueError: If the official code has no such name.
        """
        return renamed(state, _official(state))


class Bottleneck(nn.Module):
    """The depth-wise asymmetric bottleneck, residual: [N, C, h, w] to the same shape."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        half = channels // 2
        self.norm = BNAct(channels)
        self.narrow = ConvBNAct(channels, half)
        self.near, self.far = _pair(half, 1), _pair(half, dilation)
        self.norm_sum = BNAct(half)
        self.widen = nn.Conv2d(half, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.narrow(self.norm(x))
        return x + self.widen(self.norm_sum(self.near(z) + self.far(z)))  # type: ignore[no-any-return]


def _pair(channels: int, dilation: int) -> Stack:
    """Depth-wise convolutions of 3 x 1 and 1 x 3."""
    return Stack(
        ConvBNAct(channels, channels, (3, 1), dilation=dilation, groups=channels),
        ConvBNAct(channels, channels, (1, 3), dilation=dilation, groups=channels),
    )


class Down(nn.Module):
    """Joins maps and halves their size: to [N, out_channels, h, w].

    Where that makes new channels, a convolution makes them and a pool keeps the old ones; else a
    convolution makes all.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.join = BNAct(channels)
        self.pools = channels < out_channels
        made = out_channels - channels if self.pools else out_channels
        self.conv = nn.Conv2d(channels, made, 3, 2, 1, bias=False)
        self.norm = BNAct(out_channels)

    def forward(self, *maps: Tensor) -> Tensor:
        x = self.join(*maps)
        y = self.conv(x)
        if self.pools:
            y = torch.cat((y, F.max_pool2d(x, 2, ceil_mode=True)), dim=1)
        return self.norm(y)  # type: ignore[no-any-return]


def _official(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Our name of each module, by its official name; the state tells how many bottlenecks there are."""
    modules = {"classifier.0.conv": "head.classifier"}
    convs = {f"init_conv.{i}": f"stem.{i}" for i in range(3)}
    norms = {f"bn_prelu_{i}": f"{part}.join" for i, part in ((1, "down1"), (2, "down2"), (3, "head"))}
    for i in (1, 2):
        modules[f"downsample_{i}.conv3x3.conv"] = f"down{i}.conv"
        norms[f"downsample_{i}.bn_prelu"] = f"down{i}.norm"
    for row, i in set(re.findall(r"\.DAB_Module_([12])_(\d+)\.", "\n".join(state))):
        there, ours = f"DAB_Block_{row}.DAB_Module_{row}_{i}", f"row{row}.{i}"
        modules[f"{there}.conv1x1.conv"] = f"{ours}.widen"
        norms |= {f"{there}.bn_relu_1": f"{ours}.norm", f"{there}.bn_relu_2": f"{ours}.norm_sum"}
        convs |= {f"{there}.{theirs}": f"{ours}.{layer}" for theirs, layer in LAYERS.items()}
    for there, ours in convs.items():
        modules[f"{there}.conv"] = f"{ours}.0"
        modules |= {f"{there}.bn_prelu.bn": f"{ours}.1", f"{there}.bn_prelu.acti": f"{ours}.2"}
    for there, ours in norms.items():
        modules |= {f"{there}.bn": f"{ours}.0", f"{there}.acti": f"{ours}.1"}
    return modules


LAYERS = {  # of a bottleneck there, and here
    "conv3x3": "narrow",
    "dconv3x1": "near.0",
    "dconv1x3": "near.1",
    "ddconv3x1": "far.0",
    "ddconv1x3": "far.1",
}


def _check(widths: Sequence[int], dilations: Sequence[Sequence[int]]) -> None:
    if len(widths) != 3 or min(widths) < 1 or any(w % 2 for w in widths[1:]):
        raise ValueError(f"expected three positive widths, the last two even, got {widths}")
    if len(dilations) != 2 or not all(row and min(row) > 0 for row in dilations):
        raise ValueError(f"expected positive dilations for two rows of bottlenecks, got {dilations}")
