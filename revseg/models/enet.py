"""ENet: bottlenecks of a quarter of the channels, and a decoder that unpools.

The initial block halves the size beside a max pool (`ConvPool`). Two stages of bottlenecks follow at
1/4 and 1/8: a 1 x 1 convolution narrows, a 3 x 3, dilated or asymmetric (5) convolution works, a
1 x 1 convolution widens again. The decoder puts values back where the max pools of the encoder
found them, and ends with a transposed convolution at the size of the images.

Source: Paszke, Chaurasia, Kim and Culurciello, ENet: A Deep Neural Network Architecture for Real-Time
Semantic Segmentation, arXiv:1606.02147: table 1, and figure 2 for the blocks.

As in the authors' Torch7 code, which gives 364,311 parameters: inner channels are a quarter of those
that go out; the convolutions in the middle have a bias, of an asymmetric pair the second one; PReLU per
channel in the encoder, ReLU in the decoder; batch norm eps 1e-3; no batch norm between an
asymmetric pair; no dropout in the decoder. Odd sizes are rounded up on the way down and cropped on
the way up.

The reversible edition is ours, a change of the architecture and not another way to compute it. Every
bottleneck of C channels becomes two additive couplings of streams of C / 2, with four functions that are
the bottleneck's convolutions at half the channels. A convolution of half the channels has a quarter of
the weights, so widths, operations and, but for biases, batch norms and slopes, parameters stay. What
changes: no activation follows a sum, and each resolution is four times as many functions deep.

Source of the coupling: Gomez et al., The Reversible Residual Network, arXiv:1707.04585.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from revseg.couplings import AdditiveCoupling
from revseg.exact.modes import Exact
from revseg.layers.blocks import ACTIVATIONS
from revseg.layers.conv_pool import ImageConvPool
from revseg.layers.corner_pool import pool_with_corners, unpool
from revseg.layers.images import crop, even_sides
from revseg.layers.stack import Stack
from revseg.layers.upsample_conv import DoublingConv2d
from revseg.models.network import Network, check_edition
from revseg.models.policy import Memory, MemoryPolicy

EPS = 1e-3
# What the convolution in the middle is: a dilation, or "asymmetric".
STAGE2 = (1, 2, "asymmetric", 4, 1, 8, "asymmetric", 16)
Kind = int | str


Corners = tuple[Tensor, Sequence[int]]  # where the maxima were, and the size of their map


class ENet(Network):
    """ENet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, H, W].

    Args:
        num_classes: C, the number of classes.
        widths: Channels at 1/2, 1/4 and 1/8 of the size, rising, multiples of 4 (8 if reversible).
        depth: Number of bottlenecks at 1/4, beside the one that halves the size.
        repeats: How often the bottlenecks at 1/8 go through their eight kinds.
        dropout: Probability of dropping a channel at 1/4 and at 1/8.
        in_channels: Of the images.
        reversible: The bottlenecks of each resolution form one `ReversibleSequence`, which keeps only its
            output for the backward pass, however deep it is.
        memory: "least", "lowest", "balanced" or "fastest", or a policy, see `revseg.models.policy`.
        save_activations: Train with ordinary autograd: same numbers, same state dict, more memory.
        exact: Bit-for-bit inversion, if reversible: True, or "lossless"; see `ReversibleSequence`.

    Raises:
        ValueError: If an argument is unknown or out of its range.
    """

    stride = 1
    official_missing = "its authors' code is Torch7, whose files hold objects of Lua; the weights of PyTorch editions are of other layers"

    def __init__(
        self,
        num_classes: int = 19,
        *,
        widths: Sequence[int] = (16, 64, 128),
        depth: int = 4,
        repeats: int = 2,
        dropout: Sequence[float] = (0.01, 0.1),
        in_channels: int = 3,
        reversible: bool = False,
        memory: Memory = "balanced",
        save_activations: bool = False,
        exact: Exact = False,
    ) -> None:
        super().__init__(num_classes, in_channels)
        self.reversible = reversible
        _check(widths, depth, repeats, dropout, reversible)
        check_edition(reversible, exact)
        policy = MemoryPolicy.of(memory, save_activations, full_logits=True)
        policy = policy.beside_sequences() if reversible else policy

        def units(channels: int, kinds: Sequence[Kind], dropout: float, activation: str) -> nn.Module:
            if not reversible:
                row = (Bottleneck(channels, kind, dropout, activation) for kind in kinds)
                return policy.stage(nn.Sequential(*map(policy.block, row)))
            halves = (
                [bottleneck(channels // 2, kind, dropout, activation) for _ in "fg"]
                for kind in kinds
                for _ in range(2)
            )
            return policy.sequence((AdditiveCoupling(*half) for half in halves), exact)

        w1, w2, w3 = widths
        p1, p2 = dropout
        self.stem = policy.block(ImageConvPool(in_channels, w1, activation="prelu", eps=EPS))  # 1/2
        self.down1 = policy.block(Halving(w1, w2, p1))
        self.stage1 = units(w2, [1] * depth, p1, "prelu")  # 1/4
        self.down2 = policy.block(Halving(w2, w3, p2))
        self.stage2 = units(w3, STAGE2 * repeats, p2, "prelu")  # 1/8
        self.up1 = policy.block(Doubling(w3, w2))
        self.stage3 = units(w2, (1, 1), 0.0, "relu")  # 1/4
        self.up2 = policy.block(Doubling(w2, w1))
        self.stage4 = units(w1, (1,), 0.0, "relu")  # 1/2
        self.classifier = DoublingConv2d(w1, num_classes)  # 1
        self.again = policy.again()

    def logits(self, images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, C, H, W]
        encoder = self.stem, self.down1, self.stage1, self.down2, self.stage2
        decoder = self.up1, self.stage3, self.up2, self.stage4
        encoded = self.again(self._encoded, encoder, images)
        return crop(self.classifier(self.again(self._decoded, decoder, *encoded)), images.shape[-2:])

    def _encoded(self, images: Tensor) -> tuple[Tensor, Corners, Corners]:
        """The map at 1/8, and what its pools leave for those at 1/2 and 1/4."""
        x = self.stem(images)
        half = x.shape[-2:]
        x, corners1 = self.down1(x)
        quarter = x.shape[-2:]
        x, corners2 = self.down2(self.stage1(x))
        return self.stage2(x), (corners1, half), (corners2, quarter)

    def _decoded(self, x: Tensor, half: Corners, quarter: Corners) -> Tensor:
        """The map at 1/2."""
        return self.stage4(self.up2(self.stage3(self.up1(x, *quarter)), *half))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """The residual unit: act(x + bottleneck(x)), [N, C, h, w] to the same.

    Args:
        channels: C.
        kind: Dilation of the 3 x 3 convolution in the middle, or "asymmetric".
        dropout: Probability of dropping a channel before the sum.
        activation: One of `revseg.layers.blocks.ACTIVATIONS`.
    """

    def __init__(self, channels: int, kind: Kind, dropout: float, activation: str) -> None:
        super().__init__()
        self.bottleneck = bottleneck(channels, kind, dropout, activation)
        self.act = ACTIVATIONS[activation](channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.bottleneck(x))  # type: ignore[no-any-return]


def bottleneck(channels: int, kind: Kind, dropout: float, activation: str) -> Stack:
    """Narrow to a quarter, work, widen; a linear end."""
    inner = channels // 4
    middle: list[nn.Module]
    if kind == "asymmetric":
        middle = [
            nn.Conv2d(inner, inner, (1, 5), padding=(0, 2), bias=False),
            nn.Conv2d(inner, inner, (5, 1), padding=(2, 0)),
        ]
    else:
        dilation = int(kind)
        middle = [nn.Conv2d(inner, inner, 3, padding=dilation, dilation=dilation)]
    narrow = nn.Conv2d(channels, inner, 1, bias=False)
    return _bottleneck(narrow, middle, channels, dropout, activation)


class Halving(nn.Module):
    """Half the size: a bottleneck that begins with 2 x 2 and stride 2, beside a max pool.

    [N, in, H, W] to [N, out, ceil(H / 2), ceil(W / 2)], and the corners [N, in, h, w], uint8, where the
    maxima were, for `Doubling`. The pool's missing channels are zero.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out, more than come in.
        dropout: Probability of dropping a channel before the sum.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        inner = out_channels // 4
        narrow = nn.Conv2d(in_channels, inner, 2, stride=2, bias=False)
        middle = [nn.Conv2d(inner, inner, 3, padding=1)]
        self.bottleneck = _bottleneck(narrow, middle, out_channels, dropout, "prelu")
        self.act = nn.PReLU(out_channels)
        self.missing = out_channels - in_channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled, corners = pool_with_corners(x)
        even = even_sides(x)
        y = self.bottleneck(even) + F.pad(pooled, (0, 0, 0, 0, 0, self.missing))
        return self.act(y), corners


class Doubling(nn.Module):
    """Twice the size: a bottleneck around a transposed convolution, beside an unpooling.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        inner = out_channels // 4
        narrow = nn.Conv2d(in_channels, inner, 1, bias=False)
        middle = [nn.ConvTranspose2d(inner, inner, 3, stride=2, padding=1, output_padding=1)]
        self.bottleneck = _bottleneck(narrow, middle, out_channels, 0.0, "relu")
        self.narrow = Stack(
            nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels, eps=EPS)
        )

    def forward(self, x: Tensor, corners: Tensor, size: Sequence[int]) -> Tensor:
        """The map [N, out, *size] of x [N, in, h, w]; corners [N, out, h, w] are those of a `Halving`."""
        return F.relu(unpool(self.narrow(x), corners, size) + crop(self.bottleneck(x), size), inplace=True)


def _bottleneck(
    narrow: nn.Module, middle: Sequence[nn.Module], out_channels: int, dropout: float, activation: str
) -> Stack:
    inner = out_channels // 4
    return Stack(
        narrow,
        nn.BatchNorm2d(inner, eps=EPS),
        ACTIVATIONS[activation](inner),
        *middle,
        nn.BatchNorm2d(inner, eps=EPS),
        ACTIVATIONS[activation](inner),
        nn.Conv2d(inner, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels, eps=EPS),
        *([nn.Dropout2d(dropout)] if dropout > 0 else []),
    )


def _check(
    widths: Sequence[int], depth: int, repeats: int, dropout: Sequence[float], reversible: bool
) -> None:
    rising = len(widths) == 3 and 3 < widths[0] < widths[1] < widths[2]
    unit = 8 if reversible else 4  # a quarter of a stream, or of all channels
    if not rising or any(width % unit for width in widths):
        raise ValueError(f"expected three rising widths, multiples of {unit}, got {widths}")
    if depth < 1 or repeats < 1:
        raise ValueError(f"expected depth and repeats of at least 1, got {depth} and {repeats}")
    if len(dropout) != 2 or not all(0 <= p < 1 for p in dropout):
        raise ValueError(f"expected two probabilities of dropout in [0, 1), got {dropout}")
