"""Residual blocks and their stages: the backbones of PSPNet, BiSeNet and ICNet.

    y = relu(body(x) + shortcut(x))

The body of a basic block is two 3 x 3 convolutions; that of a bottleneck goes through a quarter of
its channels, 1 x 1, 3 x 3, 1 x 1. The shortcut is the identity, or a 1 x 1 convolution where size
or channels change. A dilated stage keeps its size and spreads the taps of all its 3 x 3
convolutions.

Source: He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, arXiv:1512.03385.
"""

from functools import partial
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from revseg.layers.blocks import ConvBNAct, ImageConvBNAct
from revseg.layers.stack import Stack
from revseg.models.policy import MemoryPolicy

conv_bn_relu = partial(ConvBNAct, activation="relu", eps=1e-5)
image_conv_bn_relu = partial(ImageConvBNAct, activation="relu", eps=1e-5)

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # bottlenecks of the four stages


def conv_bn(
    in_channels: int, out_channels: int, kernel: int = 1, *, stride: int = 1, dilation: int = 1
) -> Stack:
    """Convolution without bias and batch norm, as in front of a sum: [N, in, H, W] to [N, out, h, w]."""
    padding = dilation * (kernel // 2)
    return Stack(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)).

    Args:
        body: Takes x.
        shortcut: Takes x to the shape of the body's value.
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


class Block(Protocol):
    """Makes a residual block."""

    def __call__(
        self, in_channels: int, width: int, *, stride: int = 1, dilation: int = 1
    ) -> Residual: ...  # pragma: no cover


def basic(in_channels: int, width: int, *, stride: int = 1, dilation: int = 1) -> Residual:
    """Two 3 x 3 convolutions: [N, in_channels, H, W] to [N, width, h, w]."""
    body = Stack(
        conv_bn_relu(in_channels, width, stride=stride, dilation=dilation),
        conv_bn(width, width, 3, dilation=dilation),
    )
    return Residual(body, _shortcut(in_channels, width, stride))


def bottleneck(
    in_channels: int, width: int, *, stride: int = 1, dilation: int = 1, stride_first: bool = False
) -> Residual:
    """Three convolutions through `width` channels: [N, in_channels, H, W] to [N, 4 width, h, w].

    Args:
        in_channels: Channels that come in.
        width: Channels of the 3 x 3 convolution.
        stride: Of the 3 x 3 convolution, as in PyTorch's networks.
        dilation: Of the 3 x 3 convolution.
        stride_first: The first 1 x 1 convolution has the stride instead, as in the paper and in Caffe's.
    """
    first, second = (stride, 1) if stride_first else (1, stride)
    body = Stack(
        conv_bn_relu(in_channels, width, 1, stride=first),
        conv_bn_relu(width, width, stride=second, dilation=dilation),
        conv_bn(width, 4 * width),
    )
    return Residual(body, _shortcut(in_channels, 4 * width, stride))


def residual_stage(
    block: Block,
    policy: MemoryPolicy,
    in_channels: int,
    width: int,
    count: int,
    *,
    stride: int = 1,
    dilation: int = 1,
) -> nn.Module:
    """Residual blocks in a row, the first with the stride.

    Args:
        block: `basic` or `bottleneck`.
        policy: Says what runs again.
        in_channels: Channels that come in.
        width: Of every block.
        count: How many blocks.
        stride: Of the first block.
        dilation: Of every block.
    """
    out_channels = width if block is basic else 4 * width
    row = [block(in_channels, width, stride=stride, dilation=dilation)]
    row += [block(out_channels, width, dilation=dilation) for _ in range(count - 1)]
    return policy.stage(nn.Sequential(*map(policy.residual, row)))


def official_block_names(theirs: str, ours: str) -> dict[str, str]:
    """Rules for `revseg.models.official`, of blocks named as in PyTorch's own residual networks.

    Args:
        theirs: Pattern of a block's name.
        ours: Our name of that block.
    """
    rules = {}
    for i in range(3):
        rules[rf"{theirs}\.conv{i + 1}\.(?P<tail>\w+)"] = rf"{ours}.body.{i}.0.\g<tail>"
        rules[rf"{theirs}\.bn{i + 1}\.(?P<tail>\w+)"] = rf"{ours}.body.{i}.1.\g<tail>"
    rules[rf"{theirs}\.downsample\.(?P<tail>[01]\.\w+)"] = rf"{ours}.shortcut.\g<tail>"
    return rules


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return conv_bn(in_channels, out_channels, stride=stride)
