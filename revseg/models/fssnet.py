"""FSSNet: continuous factorized and dilated bottlenecks, 0.20 M parameters.

An encoder to 1/8 of the size and a decoder back to all of it. Blocks in the encoder: at 1/4 four with
a factorized convolution (1 x 3, then 3 x 1), at 1/8 six with a dilated one. The decoder goes up in two
blocks, each adding what came out of the encoder's down-sampling at its input's size, with two bottlenecks
after each. A transposed convolution reads the classes at full size. All blocks are ENet-like: a 1 x 1
convolution narrows to a quarter, a last one widens, the sum with the shortcut is activated.

Source: Zhang, Chen, Wu, Cai, Lu and Li, Fast Semantic Segmentation for Scene Perception, IEEE
Transactions on Industrial Informatics 15(2), 2019.

There is no official code. The layers are put together from what two public reimplementations
(zh320/realtime-semantic-segmentation-pytorch, xiaoyufenfei/Efficient-Segmentation-Networks) have in
common; where they differ it is the first one's choice, which has the paper's 0.2 M parameters (the
second has 0.18 M): down-sampling narrows to a quarter of its output, pools are 3 x 3, one slope for
all channels of a PReLU, no dropout. Ours is that classes get no batch norm and activation, and that a
transposed convolution before batch norm has no bias.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg.layers.blocks import ACTIVATIONS, BNAct, ConvBNAct, ImageConvBNAct
from revseg.layers.images import crop, even_sides, is_size_open, of_each_image
from revseg.layers.rerun import Rerun
from revseg.layers.stack import Stack
from revseg.models.network import Network
from revseg.models.policy import Memory, MemoryPolicy


class FSSNet(Network):
    """FSSNet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, H, W].

    Args:
        num_classes: C, the number of classes.
        widths: Channels at 1/2, 1/4 and 1/8; multiples of 4, the first more than `in_channels`.
        factorized: How many factorized blocks there are at 1/4.
        dilations: Of each block at 1/8.
        activation: "prelu_shared", "prelu" or "relu".
        in_channels: Of the images.
        memory: "least", "lowest", "balanced" or "fastest", or a policy, see `revseg.models.policy`.

    Raises:
        ValueError: If an argument is unknown or out of its range.
    """

    stride = 1

    def __init__(
        self,
        num_classes: int = 19,
        *,
        widths: Sequence[int] = (16, 64, 128),
        factorized: int = 4,
        dilations: Sequence[int] = (2, 5, 9, 2, 5, 9),
        activation: str = "prelu_shared",
        in_channels: int = 3,
        memory: Memory = "balanced",
    ) -> None:
        super().__init__(num_classes, in_channels)
        policy = MemoryPolicy.of(memory)
        _check(widths, factorized, dilations)
        if widths[0] <= in_channels:
            raise ValueError(
                f"expected a first width above the images' {in_channels} channels, got {widths[0]}"
            )
        w1, w2, w3 = widths

        def stage(*blocks: nn.Module) -> nn.Module:
            return policy.stage(Stack(*map(policy.block, blocks)))

        def dilated(channels: int, dilation: int = 1) -> nn.Module:
            inner = channels // 4
            return Residual(
                channels, activation, _layer(inner, inner, dilation=dilation, activation=activation)
            )

        def factored(channels: int) -> nn.Module:
            inner = channels // 4
            row = _layer(inner, inner, (1, 3), activation="none")
            return Residual(channels, activation, row, _layer(inner, inner, (3, 1), activation=activation))

        self.initial = policy.block(Initial(in_channels, w1, activation))  # 1/2
        self.down1 = policy.block(Down(w1, w2, activation))  # 1/4
        self.factorized = stage(*(factored(w2) for _ in range(factorized)))
        self.down2 = policy.block(Down(w2, w3, activation))  # 1/8
        self.dilated = stage(*(dilated(w3, dilation) for dilation in dilations))
        self.up2 = policy.block(Up(w3, w2, activation, policy.again()))  # 1/4
        self.refine2 = stage(dilated(w2), dilated(w2))
        self.up1 = policy.block(Up(w2, w1, activation, policy.again()))  # 1/2
        self.refine1 = stage(dilated(w1), dilated(w1))
        self.classifier = nn.ConvTranspose2d(w1, num_classes, 3, stride=2, padding=1)
        self.again = policy.again()

    def logits(self, images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, C, H, W]
        parts = [module for module in self.children() if module not in (self.classifier, self.again)]
        height, width = images.shape[-2:]
        return doubled(self.classifier, self.again(self._features, parts, images), (height, width))

    def _features(self, images: Tensor) -> Tensor:
        """The map at 1/2."""
        encoder = self.initial, self.down1, self.factorized, self.down2
        decoder = self.dilated, self.up2, self.refine2, self.up1, self.refine1
        encoded = self.again(self._encoded, encoder, images)
        return self.again(self._decoded, decoder, *encoded)  # type: ignore[no-any-return]

    def _encoded(self, images: Tensor) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """The size at 1/2, and the maps at 1/4 and 1/8."""
        x = self.initial(images)
        quarter = self.down1(x)
        return tuple(x.shape[-2:]), quarter, self.down2(self.factorized(quarter))

    def _decoded(self, half: tuple[int, ...], quarter: Tensor, eighth: Tensor) -> Tensor:
        """The map at 1/2."""
        x = self.up2(self.dilated(eighth), eighth, tuple(quarter.shape[-2:]))
        return self.refine1(self.up1(self.refine2(x), quarter, half))  # type: ignore[no-any-return]


class Initial(nn.Module):
    """A convolution's channels, and the images pooled: to [N, channels, h, w] at 1/2."""

    def __init__(self, in_channels: int, channels: int, activation: str) -> None:
        super().__init__()
        made = channels - in_channels
        self.conv = ImageConvBNAct(in_channels, made, stride=2, activation=activation, eps=1e-5)

    def forward(self, images: Tensor) -> Tensor:
        x, pool = self.conv(images), partial(F.max_pool2d, kernel_size=3, stride=2, padding=1)
        pooled = of_each_image(pool, images, self.conv.prepare)
        return torch.cat((x, pooled.to(x.dtype)), dim=1)


class Residual(nn.Module):
    """A bottleneck with these layers, of a quarter of the channels, in its middle: keeps its shape."""

    def __init__(self, channels: int, activation: str, *middle: nn.Module) -> None:
        super().__init__()
        inner = channels // 4
        narrow = _layer(channels, inner, 1, activation=activation)
        self.branch = Stack(narrow, *middle, _layer(inner, channels, 1, activation="none"))
        self.act = ACTIVATIONS[activation](channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.branch(x))  # type: ignore[no-any-return]


class Down(nn.Module):
    """Half the size: a bottleneck, beside a pool and a 1 x 1 convolution."""

    def __init__(self, channels: int, out_channels: int, activation: str) -> None:
        super().__init__()
        inner = out_channels // 4
        self.branch = Stack(
            nn.Conv2d(channels, inner, 2, stride=2, bias=False),
            nn.BatchNorm2d(inner),
            ACTIVATIONS[activation](inner),
            _layer(inner, inner, activation=activation),
            _layer(inner, out_channels, 1, activation="none"),
        )
        self.shortcut = _layer(channels, out_channels, 1, activation="none")
        self.act = ACTIVATIONS[activation](out_channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x, 3, stride=2, padding=1)
        return self.act(self.shortcut(pooled) + self.branch(even_sides(x)))  # type: ignore[no-any-return]


class Up(nn.Module):
    """Double the size: a bottleneck, beside a 1 x 1 convolution of the sum of two maps, upsampled."""

    def __init__(self, channels: int, out_channels: int, activation: str, again: Rerun) -> None:
        super().__init__()
        self.again = again
        inner = channels // 4
        self.narrow = _layer(channels, inner, 1, activation=activation)
        self.upsample = nn.ConvTranspose2d(inner, inner, 3, stride=2, padding=1, bias=False)
        self.widen = Stack(
            BNAct(inner, activation=activation, eps=1e-5),
            _layer(inner, out_channels, 1, activation="none"),
        )
        self.shortcut = _layer(channels, out_channels, 1, activation="none")
        self.act = ACTIVATIONS[activation](out_channels)

    def forward(self, x: Tensor, skip: Tensor, size: tuple[int, int]) -> Tensor:
        y = self.again(self._doubled, (self.narrow, self.upsample, self.widen), x, size)
        main = F.interpolate(self.shortcut(x + skip), size=size, mode="bilinear", align_corners=True)
        return self.act(main + y)  # type: ignore[no-any-return]

    def _doubled(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.widen(doubled(self.upsample, self.narrow(x), size))  # type: ignore[no-any-return]


def doubled(conv: nn.ConvTranspose2d, x: Tensor, size: tuple[int, int]) -> Tensor:
    """A transposed 3 x 3 convolution with stride 2 of x [N, C, h, w], to a size of 2 h or 2 h - 1 a side."""
    if not is_size_open(x):
        return conv(x, output_size=size)  # type: ignore[no-any-return]
    return crop(F.conv_transpose2d(x, conv.weight, conv.bias, 2, 1, output_padding=1), size)


_layer = partial(ConvBNAct, eps=1e-5)


def _check(widths: Sequence[int], factorized: int, dilations: Sequence[int]) -> None:
    if len(widths) != 3 or min(widths) < 4 or any(w % 4 for w in widths):
        raise ValueError(f"expected three widths that are multiples of 4, got {widths}")
    if factorized < 1:
        raise ValueError(f"expected at least 1 factorized block, got {factorized}")
    if not dilations or min(dilations) < 1:
        raise ValueError(f"expected positive dilations, one for each block at 1/8, got {dilations}")
