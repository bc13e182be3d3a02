"""FPENet: depth-wise pyramids in every block, maps that gate each other on the way up, 0.362 M parameters.

A convolution makes 16 channels at 1/2 of the size; feature pyramid encoding (FPE) blocks follow there, at
1/4 and at 1/8. A block widens its input, sends each quarter of the channels through a depth-wise
convolution of its own dilation, adds each result to the next one, and narrows again; its input is added
where the shape is kept. On the way back to 1/2 two mutual embedding upsample (MEU) modules join a low
(fine) and a high (coarse) map: where something is, seen in the low map, gates the high one; what there
is, seen in the high map, gates the low one.

Source: Liu and Yin, Feature Pyramid Encoding Network for Real-time Semantic Segmentation,
arXiv:1909.08599, figures 1 to 3.

There is no official code. The encoder is that of zh320/realtime-semantic-segmentation-pytorch, which is
near the paper's 0.4 M parameters: all blocks of the last two stages widen four times, strides lie in the
depth-wise convolutions, and results are added behind them. (xiaoyufenfei/Efficient-Segmentation-Networks
widens in the first block of a stage alone, adds in front of them, and has 0.115 M.) The gates are sigmoids
without batch norm, as in the second, so that a batch of one can be trained; and classes get no batch norm
and activation.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg.layers.blocks import ConvBNAct, ImageConvBNAct
from revseg.layers.stack import Stack
from revseg.models.network import Network
from revseg.models.policy import Memory, MemoryPolicy


class FPENet(Network):
    """FPENet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, h, w].

    h = ceil(H / 2), w = ceil(W / 2).

    Args:
        num_classes: C, the number of classes.
        widths: Channels at 1/2, 1/4 and 1/8.
        blocks: Of the last two stages, the one that halves the size among them.
        expansion: How many times wider a block of these is inside.
        dilations: Of the parts of a block. Their number divides `widths[0]` and the last two widths
            times `expansion`.
        in_channels: Of the images.
        memory: "least", "lowest", "balanced" or "fastest", or a policy, see `revseg.models.policy`.

    Raises:
        ValueError: If an argument is unknown or out of its range.
    """

    stride = 2

    def __init__(
        self,
        num_classes: int = 19,
        *,
        widths: Sequence[int] = (16, 32, 64),
        blocks: Sequence[int] = (3, 9),
        expansion: int = 4,
        dilations: Sequence[int] = (1, 2, 4, 8),
        in_channels: int = 3,
        memory: Memory = "balanced",
    ) -> None:
        super().__init__(num_classes, in_channels)
        policy = MemoryPolicy.of(memory)
        _check(widths, blocks, expansion, dilations)
        w1, w2, w3 = widths
        block = partial(FPEBlock, expansion=expansion, dilations=dilations)

        def stage(channels: int, out: int, count: int) -> nn.Module:
            row = block(channels, out, stride=2), *(block(out, out) for _ in range(count - 1))
            return policy.stage(Stack(*map(policy.block, row)))

        first = policy.block(ImageConvBNAct(in_channels, w1, stride=2, activation="relu", eps=1e-5))
        pyramid = policy.block(FPEBlock(w1, w1, expansion=1, dilations=dilations))
        self.stage1 = policy.stage(Stack(first, pyramid))  # 1/2
        self.stage2 = stage(w1, w2, blocks[0])  # 1/4
        self.stage3 = stage(w2, w3, blocks[1])  # 1/8
        self.up2 = policy.block(MEU(w2, w3, w3))  # 1/4
        self.up1 = policy.block(MEU(w1, w3, w2))  # 1/2
        self.classifier = nn.Conv2d(w2, num_classes, 1)

    def logits(self, images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, C, h, w]
        half = self.stage1(images)
        quarter = self.stage2(half)
        return self.classifier(self.up1(half, self.up2(quarter, self.stage3(quarter))))  # type: ignore[no-any-return]


class FPEBlock(nn.Module):
    """Feature pyramid encoding: [N, C, h, w] to [N, out_channels, h / stride, w / stride], rounded up."""

    def __init__(
        self, channels: int, out_channels: int, *, expansion: int, dilations: Sequence[int], stride: int = 1
    ) -> None:
        super().__init__()
        inner = out_channels * expansion
        part = inner // len(dilations)
        self.widen = _layer(channels, inner, 1)
        self.pyramid = nn.ModuleList(
            _layer(part, part, stride=stride, dilation=d, groups=part) for d in dilations
        )
        self.narrow = _layer(inner, out_channels, 1)
        self.adds = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        parts = self.widen(x).chunk(len(self.pyramid), dim=1)
        sums: list[Tensor] = []
        for layer, part in zip(self.pyramid, parts, strict=True):
            sums.append(sums[-1] + layer(part) if sums else layer(part))
        y = self.narrow(torch.cat(sums, dim=1))
        return x + y if self.adds else y  # type: ignore[no-any-return]


class MEU(nn.Module):
    """Mutual embedding upsample: a low map [N, ., h, w] and a high one to [N, out_channels, h, w]."""

    def __init__(self, low_channels: int, high_channels: int, out_channels: int) -> None:
        super().__init__()
        self.low = _layer(low_channels, out_channels, 1)
        self.high = _layer(high_channels, out_channels, 1)
        self.where = nn.Conv2d(1, 1, 1)  # of the mean over channels
        self.what = nn.Conv2d(out_channels, out_channels, 1)  # of the mean over the map

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        low, high = self.low(low), self.high(high)
        where = self.where(low.mean(1, keepdim=True)).sigmoid()
        what = self.what(high.mean((2, 3), keepdim=True)).sigmoid()
        high = F.interpolate(high, size=tuple(low.shape[-2:]), mode="bilinear", align_corners=True)
        return low * what + high * where  # type: ignore[no-any-return]


_layer = partial(ConvBNAct, activation="relu", eps=1e-5)


def _check(widths: Sequence[int], blocks: Sequence[int], expansion: int, dilations: Sequence[int]) -> None:
    if len(widths) != 3 or min(widths) < 1:
        raise ValueError(f"expected three positive widths, got {widths}")
    if len(blocks) != 2 or min(blocks) < 1:
        raise ValueError(f"expected two positive numbers of blocks, at 1/4 and 1/8, got {blocks}")
    if expansion < 1:
        raise ValueError(f"expected an expansion of at least 1, got {expansion}")
    if not dilations or min(dilations) < 1:
        raise ValueError(f"expected positive dilations, got {dilations}")
    inner = [widths[0], widths[1] * expansion, widths[2] * expansion]
    if any(width % len(dilations) for width in inner):
        raise ValueError(f"expected blocks of widths {inner} inside to divide into {len(dilations)} parts")
