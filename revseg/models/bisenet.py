"""BiSeNet: a wide, shallow path for detail beside a deep, narrow one for context.

The spatial path takes the image to 1/8 in four convolutions. The context path is a backbone,
ResNet18 or Xception39, with an attention refinement module (ARM) on its maps at 1/32 and at 1/16.
The mean of the map at 1/32 is added to the first, the first, at 1/16, to the second; the sum
arrives at 1/8, where a feature fusion module (FFM) joins both paths. In training two auxiliary
heads read the context path, at 1/16 and at 1/8.

Source: Yu, Wang, Peng, Gao, Yu and Sang, BiSeNet: Bilateral Segmentation Network for Real-time
Semantic Segmentation, arXiv:1808.00897, figure 2.

The layers are those of the official code (ycszen/TorchSeg). Other than in the paper's figure: a
3 x 3 convolution opens each ARM and follows each upsampling, a fourth, 1 x 1 convolution ends the
spatial path, sums stand in place of concatenation, and the auxiliary heads read refined maps. The
"49.0 M" and "5.8 M" that comparisons list for BiSeNet's parameters are megabytes in float32; they are 12.9
and 1.5 million. A batch of one image trains, as batch norm behind a global pool is
`PooledBatchNorm2d`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg.layers.blocks import PooledBatchNorm2d
from revseg.layers.images import IMAGENET
from revseg.layers.stack import Stack
from revseg.models.bisenet_official import OFFICIAL_RESNET18, OFFICIAL_XCEPTION39
from revseg.models.network import Network, check_channels
from revseg.models.official import renamed_by
from revseg.models.policy import Memory, MemoryPolicy
from revseg.models.resnet import (
    basic,
    conv_bn_relu,
    image_conv_bn_relu,
    residual_stage,
)
from revseg.models.xception39 import COUNTS, xception_stage


class BiSeNet(Network):
    """BiSeNet on any backbone: images [N, 3, H, W] to logits [N, num_classes, h, w].

    h = ceil(H / 8), w = ceil(W / 8). In training with auxiliary heads a tuple: the logits, those of the
    head at 1/16, and those of the head at 1/8. The paper gives all three the same weight.

    Args:
        num_classes: C, the number of classes.
        backbone: Stages that halve a map in turn, from images on, the last two at 1/16 and 1/32.
        channels: Of the backbone's last two maps.
        width: Channels of the paths where they meet; the paper's 128.
        aux_channels: Channels inside of an auxiliary head; None without those heads.
        in_channels: Of the images.
        policy: Says what runs again.
    """

    stride = 8
    official_normalizations: ClassVar = {None: IMAGENET}

    def __init__(
        self,
        num_classes: int,
        backbone: Sequence[nn.Module],
        channels: tuple[int, int],
        width: int,
        aux_channels: int | None,
        in_channels: int,
        policy: MemoryPolicy,
    ) -> None:
        super().__init__(num_classes, in_channels)
        again = policy.block
        half = width // 2

        self.spatial = again(
            Stack(
                image_conv_bn_relu(in_channels, half, 7, stride=2),
                conv_bn_relu(half, half, stride=2),
                conv_bn_relu(half, half, stride=2),
                conv_bn_relu(half, width, 1),
            )
        )
        self.backbone = nn.ModuleList(backbone)
        self.context = pooled_conv(channels[1], width, nn.ReLU())
        self.refinements = nn.ModuleList(again(Refinement(c, width)) for c in reversed(channels))
        self.fusion = again(Fusion(2 * width))
        self.head = again(_head(2 * width, half, num_classes))
        self.aux = None
        if aux_channels is not None:
            self.aux = nn.ModuleList(again(_head(width, aux_channels, num_classes)) for _ in range(2))

    def logits(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:  # [N, 3, H, W] -> [N, C, h, w]
        spatial = self.spatial(images)
        at16 = images
        for stage in self.backbone[:-1]:
            at16 = stage(at16)
        at32 = self.backbone[-1](at16)
        y16 = self.refinements[0](at32, self.context(at32), at16.shape[-2:])
        y8 = self.refinements[1](at16, y16, spatial.shape[-2:])
        logits: Tensor = self.head(self.fusion(spatial, y8))
        if not self.training or self.aux is None:
            return logits
        return logits, self.aux[0](y16), self.aux[1](y8)


class BiSeNetResNet18(BiSeNet):
    """BiSeNet with ResNet18 as its context path; see `BiSeNet` for what goes in and out.

    Args:
        num_classes: C, the number of classes.
        width: Channels of ResNet18's first stage; all others follow, up to 8 times as many.
        aux: Whether there are auxiliary heads.
        in_channels: Of the images.
        memory: "least", "lowest", "balanced" or "fastest", or a policy, see `revseg.models.policy`. Predicted peak of a training
            step, one image of 1024 x 2048 in float32: 571, 571 and 1,263 MiB (2,375 with PyTorch's own
            modules and loss).

    Raises:
        ValueError: If an argument is unknown or out of its range.
    """

    def __init__(
        self,
        num_classes: int = 19,
        *,
        width: int = 64,
        aux: bool = True,
        in_channels: int = 3,
        memory: Memory = "balanced",
    ) -> None:
        w = _checked(num_classes, in_channels, width)
        policy = MemoryPolicy.of(memory).keeping_no_maps()
        stem = Stack(image_conv_bn_relu(in_channels, w, 7, stride=2), nn.MaxPool2d(3, stride=2, padding=1))
        stage = partial(residual_stage, basic, policy)
        stages = [stage(w, w, 2), *(stage(c, 2 * c, 2, stride=2) for c in (w, 2 * w, 4 * w))]
        backbone = [policy.block(stem), *stages]
        aux_channels = 4 * w if aux else None
        super().__init__(num_classes, backbone, (4 * w, 8 * w), 2 * w, aux_channels, in_channels, policy)

    @staticmethod
    def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our names for weights named as in ycszen/TorchSeg; see `revseg.models.load_official`.

        Raises:
            ValueError: If a name is unknown.
        """
        return renamed_by(state, OFFICIAL_RESNET18)


class BiSeNetXception39(BiSeNet):
    """BiSeNet with Xception39 as its context path; see `BiSeNet` for what goes in and out.

    Args:
        num_classes: C, the number of classes.
        width: Of Xception39: channels of its first convolution; all others follow, up to 32 times
            as many.
        aux: Whether there are auxiliary heads.
        in_channels: Of the images.
        memory: "least", "lowest", "balanced" or "fastest", or a policy, see `revseg.models.policy`. Predicted peak of a training
            step, one image of 1024 x 2048 in float32: 336, 336 and 843 MiB (1,851 with PyTorch's own
            modules and loss).

    Raises:
        ValueError: If an argument is unknown or out of its range.
    """

    def __init__(
        self,
        num_classes: int = 19,
        *,
        width: int = 8,
        aux: bool = True,
        in_channels: int = 3,
        memory: Memory = "balanced",
    ) -> None:
        w = _checked(num_classes, in_channels, width)
        policy = MemoryPolicy.of(memory).keeping_no_maps()
        stem = Stack(image_conv_bn_relu(in_channels, w, stride=2), nn.MaxPool2d(3, stride=2, padding=1))
        before = (w, 8 * w, 16 * w)
        inner = (2 * w, 4 * w, 8 * w)
        stages = [xception_stage(policy, *each) for each in zip(before, inner, COUNTS, strict=True)]
        backbone = [policy.block(stem), *stages]
        aux_channels = 16 * w if aux else None
        super().__init__(num_classes, backbone, (16 * w, 32 * w), 16 * w, aux_channels, in_channels, policy)

    @staticmethod
    def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our names for weights named as in ycszen/TorchSeg; see `revseg.models.load_official`.

        Raises:
            ValueError: If a name is unknown.
        """
        return renamed_by(state, OFFICIAL_XCEPTION39)


class Refinement(nn.Module):
    """ARM, the coarser map added, one step up: [N, in_channels, h, w] to [N, channels, H, W].

    ARM: a 3 x 3 convolution, of which each channel is scaled by what the mean of the map says.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = conv_bn_relu(in_channels, channels)
        self.attention = pooled_conv(channels, channels, nn.Sigmoid())
        self.refine = conv_bn_relu(channels, channels)

    def forward(self, x: Tensor, coarser: Tensor, size: Sequence[int]) -> Tensor:
        """The refined map.

        Args:
            x: Of the backbone [N, in_channels, h, w].
            coarser: To be added [N, channels, h, w], or [N, channels, 1, 1] to every pixel.
            size: H and W to arrive at.
        """
        y = self.conv(x)
        y = y * self.attention(y) + coarser
        y = F.interpolate(y, size=tuple(size), mode="bilinear", align_corners=True)
        return self.refine(y)  # type: ignore[no-any-return]


class Fusion(nn.Module):
    """FFM: a 1 x 1 convolution of both paths, plus itself scaled by what its mean says.

    [N, channels / 2, h, w] twice to [N, channels, h, w].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv_bn_relu(channels, channels, 1)
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        y = self.conv(torch.cat((spatial, context), dim=1))
        return y + y * self.attention(y)  # type: ignore[no-any-return]


def pooled_conv(in_channels: int, out_channels: int, act: nn.Module) -> nn.Sequential:
    """The mean of a map, through a layer: [N, in_channels, h, w] to [N, out_channels, 1, 1]."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        PooledBatchNorm2d(out_channels),
        act,
    )


def _head(in_channels: int, channels: int, num_classes: int) -> Stack:
    return Stack(conv_bn_relu(in_channels, channels), nn.Conv2d(channels, num_classes, 1))


def _checked(num_classes: int, in_channels: int, width: int) -> int:
    """The width, before any layer is made."""
    check_channels(num_classes, in_channels)
    if width < 1:
        raise ValueError(f"expected a width of at least 1, got {width}")
    return width
