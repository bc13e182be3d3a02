"""CGNet: every block weighs what is near against what lies around it, 0.496 M parameters.

Three convolutions make 32 channels at 1/2 of the size. Two stages follow, at 1/4 and 1/8. A
context-guided block narrows its input, convolves each channel twice, close by (f_loc) and dilated
(f_sur), joins the two maps (f_joi), and scales the channels of that by a gate that sees the whole map
(f_glo); its input is added. The images, pooled, come in again before each stage; what enters a stage
is joined to what leaves it.

Source: Wu, Tang, Zhang and Zhang, CGNet: A Light-weight Context Guided Network for Semantic
Segmentation, arXiv:1811.08201, figure 3 and table I; CGNet_M3N21 by default.

The layers are those of the official code (github.com/wutianyiRosun/CGNet). There the block that
halves the size starts with a 3 x 3 convolution that is called conv1x1, and has a 1 x 1 convolution
before its gate; the paper's figure shows neither. It takes the mean of the data set out of bytes and does
not divide: `load_official` sees to that.
"""

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from revseg.layers.blocks import BNAct, ConvBNAct, ImageConvBNAct, JoinedClassifier
from revseg.layers.convolution import Convolution
from revseg.layers.images import Normalization, image_pyramid
from revseg.layers.layer_module import LayerModule, Linear
from revseg.layers.side_by_side import SideBySide
from revseg.layers.stack import Stack
from revseg.models.network import Network
from revseg.models.official import renamed
from revseg.models.policy import Memory, MemoryPolicy


class CGNet(Network):
    """CGNet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, h, w].

    h = ceil(H / 8), w = ceil(W / 8).

    Args:
        num_classes: C, the number of classes.
        widths: Channels of the three stages; even.
        blocks: M and N, the blocks of stages 2 and 3, the one that halves the size among them.
        dilations: Of f_sur in stages 2 and 3.
        reductions: How much narrower the middle of the gate is in stages 2 and 3.
        dropout: Probability of dropping a channel before the classifier.
        in_channels: Of the images.
        memory: "least", "lowest", "balanced" or "fastest", or a policy, see `revseg.models.policy`.

    Raises:
        ValueError: If an argument is unknown or out of its range.
    """

    stride = 8
    official_normalizations: ClassVar = {  # of RGB images, from which the mean of BGR ones is taken, as in the official code
        19: Normalization.of_bytes((72.3924, 82.90902, 73.158325), (1.0, 1.0, 1.0)),
        11: Normalization.of_bytes((105.65775, 103.329834, 99.625404), (1.0, 1.0, 1.0)),
    }

    def __init__(
        self,
        num_classes: int = 19,
        *,
        widths: Sequence[int] = (32, 64, 128),
        blocks: Sequence[int] = (3, 21),
        dilations: Sequence[int] = (2, 4),
        reductions: Sequence[int] = (8, 16),
        dropout: float = 0.0,
        in_channels: int = 3,
        memory: Memory = "balanced",
    ) -> None:
        super().__init__(num_classes, in_channels)
        policy = MemoryPolicy.of(memory)
        _check(widths, blocks, dilations, reductions, dropout)
        w1, w2, w3 = widths

        def stage(i: int, channels: int) -> nn.Module:
            dilation, reduction = dilations[i], reductions[i]
            row = (ContextGuidedBlock(channels, dilation, reduction) for _ in range(blocks[i] - 1))
            return policy.stage(Stack(*map(policy.block, row)))

        def down(i: int, channels: int, out_channels: int) -> nn.Module:
            return policy.block(Down(channels, out_channels, dilations[i], reductions[i]))

        self.stem = policy.block(
            Stack(ImageConvBNAct(in_channels, w1, stride=2), ConvBNAct(w1, w1), ConvBNAct(w1, w1))
        )  # 1/2
        self.down2 = down(0, w1 + in_channels, w2)  # 1/4
        self.stage2 = stage(0, w2)
        self.down3 = down(1, 2 * w2 + in_channels, w3)  # 1/8
        self.stage3 = stage(1, w3)
        self.head = policy.block(JoinedClassifier(2 * w3, num_classes, dropout))
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight)

    def logits(self, images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, C, h, w]
        half, quarter = image_pyramid(images, 2, self.normalization)
        x = self.down2(self.stem(images), half)
        x = self.down3(self.stage2(x), x, quarter)
        return self.head(x, self.stage3(x))  # type: ignore[no-any-return]

    @staticmethod
    def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a state dict of the official code by our names.

        Raises:
            ValueError: If the official code has no such name.
        """
        return renamed(state, _official(state))


class Surroundings(LayerModule):
    """f_loc and f_sur of a map, joined (f_joi): [N, C, h, w] to [N, 2 C, h, w]."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.surround = nn.Conv2d(
            channels, channels, 3, padding=dilation, dilation=dilation, groups=channels, bias=False
        )
        self.norm = BNAct(2 * channels)

    def plain(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat((self.local(x), self.surround(x)), dim=1))  # type: ignore[no-any-return]

    def linear(self) -> Linear | None:
        local, surround = Convolution.of(self.local), Convolution.of(self.surround)
        if local is None or surround is None:
            return None
        return SideBySide([local, surround]), (self.local.weight, self.surround.weight)


class GlobalGate(nn.Sequential):
    """f_glo: every channel scaled by a number in (0, 1) that the means of all channels give."""

    def __init__(self, channels: int, reduction: int) -> None:
        narrow = channels // reduction
        super().__init__(nn.Linear(channels, narrow), nn.ReLU(), nn.Linear(narrow, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        scale = super().forward(x.mean((2, 3)))  # type: ignore[no-untyped-call]
        return x * scale[:, :, None, None]  # type: ignore[no-any-return]


class ContextGuidedBlock(nn.Module):
    """The residual block: [N, C, h, w] to the same shape."""

    def __init__(self, channels: int, dilation: int, reduction: int) -> None:
        super().__init__()
        half = channels // 2
        self.context = Stack(ConvBNAct(channels, half, 1), Surroundings(half, dilation))
        self.gate = GlobalGate(channels, reduction)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(self.context(x))  # type: ignore[no-any-return]


class Down(nn.Module):
    """Joins maps, halves their size, and looks around like a block: to [N, out_channels, h, w]."""

    def __init__(self, channels: int, out_channels: int, dilation: int, reduction: int) -> None:
        super().__init__()
        self.join = BNAct(channels)
        self.context = Stack(
            ConvBNAct(channels, out_channels, stride=2), Surroundings(out_channels, dilation)
        )
        self.reduce = nn.Conv2d(2 * out_channels, out_channels, 1, bias=False)
        self.gate = GlobalGate(out_channels, reduction)

    def forward(self, *maps: Tensor) -> Tensor:
        return self.gate(self.reduce(self.context(self.join(*maps))))  # type: ignore[no-any-return]


def _official(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Our name of each module, by its official name; the state tells how many blocks there are."""
    modules = {"classifier.0.conv": "head.classifier", "classifier.1.conv": "head.classifier"}
    for there, ours in (("b1", "down2"), ("bn_prelu_2", "down3"), ("bn_prelu_3", "head")):
        modules |= {f"{there}.bn": f"{ours}.join.0", f"{there}.act": f"{ours}.join.1"}
    for i in range(3):
        modules |= {f"level1_{i}.{part}": f"stem.{i}.{k}" for k, part in enumerate(CONV_BN_ACT)}
    rows = {(f"level{i}_0", f"down{i}") for i in (2, 3)}
    for level, i in re.findall(r"^(?:module\.)?level([23])\.(\d+)\.", "\n".join(state), re.MULTILINE):
        rows.add((f"level{level}.{i}", f"stage{level}.{i}"))
    for there, ours in rows:
        norm = f"{there}.bn_prelu" if "." in there else there
        modules |= {f"{there}.conv1x1.{part}": f"{ours}.context.0.{k}" for k, part in enumerate(CONV_BN_ACT)}
        modules |= {
            f"{there}.F_loc.conv": f"{ours}.context.1.local",
            f"{there}.F_sur.conv": f"{ours}.context.1.surround",
            f"{norm}.bn": f"{ours}.context.1.norm.0",
            f"{norm}.act": f"{ours}.context.1.norm.1",
            f"{there}.reduce.conv": f"{ours}.reduce",
            f"{there}.F_glo.fc.0": f"{ours}.gate.0",
            f"{there}.F_glo.fc.2": f"{ours}.gate.2",
        }
    return modules


CONV_BN_ACT = ("conv", "bn", "act")


def _check(
    widths: Sequence[int],
    blocks: Sequence[int],
    dilations: Sequence[int],
    reductions: Sequence[int],
    dropout: float,
) -> None:
    if len(widths) != 3 or min(widths) < 1 or any(w % 2 for w in widths[1:]):
        raise ValueError(f"expected three positive widths, the last two even, got {widths}")
    for name, values in (("blocks", blocks), ("dilations", dilations), ("reductions", reductions)):
        if len(values) != 2 or min(values) < 1:
            raise ValueError(f"expected two positive {name}, for stages 2 and 3, got {values}")
    if any(width < reduction for width, reduction in zip(widths[1:], reductions, strict=True)):
        raise ValueError(f"expected reductions of at most the widths {widths[1:]}, got {reductions}")
    if not 0 <= dropout < 1:
        raise ValueError(f"expected dropout in [0, 1), got {dropout}")
