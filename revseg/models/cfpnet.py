"""CFPNet: pyramids of channels, each with its own dilation, 0.272 M parameters.

Three convolutions make 32 channels at 1/2 of the size. Rows of CFP modules follow at 1/4 and 1/8. A
module narrows to a quarter and sends the result through four feature pyramid channels, of dilations
1, r / 4, r / 2 and r. In each three pairs of 3 x 1 and 1 x 3 convolutions see further and further, and
their outputs are joined. Each channel's map is added to the next one's; all are joined, mixed by a
1 x 1 convolution, and added to the module's input. The images come in again at every size.

Source: Lou and Loew, CFPNet: Channel-wise Feature Pyramid for Real-Time Semantic Segmentation,
arXiv:2103.12212, figures 3 to 5.

The author's code (github.com/AngeLouCN/CFPNet) is a third version, with 0.551 M parameters: 3 x 3
convolutions narrow, those of the pyramid are grouped, batch norm stands before convolutions, and what
enters a row is joined to what leaves it. Ours is the first version, as the paper draws it and as
zh320/realtime-semantic-segmentation-pytorch builds it: with dense convolutions in the pyramid and one
slope for all channels of a PReLU. Ours alone is that classes get no batch norm and activation.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg.layers.blocks import ConvBNAct, ImageConvBNAct
from revseg.layers.images import of_each_image
from revseg.layers.stack import Stack
from revseg.models.network import Network
from revseg.models.policy import Memory, MemoryPolicy


class CFPNet(Network):
    """CFPNet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, h, w].

    h = ceil(H / 8), w = ceil(W / 8).

    Args:
        num_classes: C, the number of classes.
        widths: Channels of the stem and the two rows, the last two multiples of 16 and each at least 4
            more than the one before.
        dilations: r of each module, for each row.
        activation: "prelu_shared", "prelu" or "relu".
        in_channels: Of the images.
        memory: "least", "lowest", "balanced" or "fastest", or a policy, see `revseg.models.policy`.

    Raises:
        ValueError: If an argument is unknown or out of its range.
    """

    stride = 8

    def __init__(
        self,
        num_classes: int = 19,
        *,
        widths: Sequence[int] = (32, 64, 128),
        dilations: Sequence[Sequence[int]] = ((2, 2), (4, 4, 8, 8, 16, 16)),
        activation: str = "prelu_shared",
        in_channels: int = 3,
        memory: Memory = "balanced",
    ) -> None:
        super().__init__(num_classes, in_channels)
        _check(widths, dilations)
        policy = MemoryPolicy.of(memory)
        w1, w2, w3 = widths

        def row(channels: int, dilations: Sequence[int]) -> nn.Module:
            modules = (CFPModule(channels, dilation, activation) for dilation in dilations)
            return policy.stage(Stack(*map(policy.block, modules)))

        first = ImageConvBNAct(in_channels, w1, stride=2, activation=activation, eps=1e-5)
        layers = (_layer(w1, w1, activation=activation) for _ in range(2))
        self.stem = policy.block(Stack(first, *layers))  # 1/2
        self.down1 = policy.block(Down(w1 + in_channels, w2, activation))  # 1/4
        self.row1 = row(w2, dilations[0])
        self.down2 = policy.block(Down(w2 + in_channels, w3, activation))  # 1/8
        self.row2 = row(w3, dilations[1])
        self.classifier = nn.Conv2d(w3 + in_channels, num_classes, 1)

    def logits(self, images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, C, h, w]
        x = self.stem(images)
        x = self.row1(self.down1(x, self._images_like(images, x)))
        x = self.row2(self.down2(x, self._images_like(images, x)))
        return self.classifier(torch.cat((x, self._images_like(images, x)), dim=1))  # type: ignore[no-any-return]

    def _images_like(self, images: Tensor, x: Tensor) -> Tensor:
        """The images at the size of a map, and in its dtype."""
        resize = partial(F.interpolate, size=tuple(x.shape[-2:]), mode="bilinear", align_corners=True)
        return of_each_image(resize, images, self.normalization).to(x.dtype)


class CFPModule(nn.Module):
    """Channel-wise feature pyramid, residual: [N, C, h, w] to the same shape."""

    def __init__(self, channels: int, dilation: int, activation: str) -> None:
        super().__init__()
        dilations = (1, -(-dilation // 4), -(-dilation // 2), dilation)
        self.narrow = _layer(channels, channels // 4, 1, activation=activation)
        self.pyramid = nn.ModuleList(FPChannel(channels // 4, d, activation) for d in dilations)
        self.mix = _layer(channels, channels, 1, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        z = self.narrow(x)
        sums: list[Tensor] = []
        for channel in self.pyramid:
            sums.append(sums[-1] + channel(z) if sums else channel(z))
        return x + self.mix(torch.cat(sums, dim=1))  # type: ignore[no-any-return]


class FPChannel(nn.Module):
    """Feature pyramid channel: three pairs, one after another, their outputs joined: keeps its shape."""

    def __init__(self, channels: int, dilation: int, activation: str) -> None:
        super().__init__()
        layer = partial(_layer, dilation=dilation, activation=activation)
        outs = (channels // 4, channels // 4, channels // 2)
        ins = (channels, *outs[:2])
        self.pairs = nn.ModuleList(
            Stack(layer(c, out, (3, 1)), layer(out, out, (1, 3))) for c, out in zip(ins, outs, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for pair in self.pairs:
            x = pair(x)
            maps.append(x)
        return torch.cat(maps, dim=1)


class Down(nn.Module):
    """Joins maps and halves their size: new channels by a convolution, the old ones by a pool."""

    def __init__(self, channels: int, out_channels: int, activation: str) -> None:
        super().__init__()
        self.conv = _layer(channels, out_channels - channels, stride=2, activation=activation)

    def forward(self, *maps: Tensor) -> Tensor:
        x = torch.cat(maps, dim=1)
        return torch.cat((self.conv(x), F.max_pool2d(x, 3, stride=2, padding=1)), dim=1)


_layer = partial(ConvBNAct, eps=1e-5)


def _check(widths: Sequence[int], dilations: Sequence[Sequence[int]]) -> None:
    rising = len(widths) == 3 and 1 <= widths[0] <= widths[1] - 4 and widths[1] <= widths[2] - 4
    if not rising or any(w % 16 for w in widths[1:]):
        raise ValueError(f"expected three rising widths, the last two multiples of 16, got {widths}")
    if len(dilations) != 2 or not all(row and min(row) > 0 for row in dilations):
        raise ValueError(f"expected positive dilations for two rows of modules, got {dilations}")
