"""Xception39, the light backbone of BiSeNet.

Residual blocks of three separable convolutions, with a quarter of their channels until the last
one: a depthwise 3 x 3 convolution that nothing follows, then a 1 x 1 convolution with batch norm
and, but for the last, a ReLU. One convolution and a pool come before, three stages of 4, 8 and 4
blocks end at 1/8, 1/16 and 1/32.

Source: Yu et al., BiSeNet, arXiv:1808.00897, takes it from Chollet, Xception, arXiv:1610.02357; the
layers are those of the official code (ycszen/TorchSeg, furnace/base_model/xception.py).
"""

from torch import nn

from revseg.layers.stack import Stack
from revseg.models.policy import MemoryPolicy
from revseg.models.resnet import Residual

COUNTS = (4, 8, 4)  # blocks of the three stages


def separable(in_channels: int, out_channels: int, *, stride: int = 1, relu: bool = True) -> Stack:
    """A separable 3 x 3 convolution: [N, in_channels, H, W] to [N, out_channels, h, w]."""
    return Stack(
        nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        *([nn.ReLU()] if relu else []),
    )


def xception_block(in_channels: int, width: int, *, stride: int = 1) -> Residual:
    """Three separable convolutions: [N, in_channels, H, W] to [N, 4 width, h, w].

    The shortcut is the identity, with a stride another separable convolution.
    """
    body = Stack(
        separable(in_channels, width, stride=stride),
        separable(width, width),
        separable(width, 4 * width, relu=False),
    )
    if stride == 1:
        return Residual(body, nn.Identity())
    return Residual(body, separable(in_channels, 4 * width, stride=stride, relu=False))


def xception_stage(policy: MemoryPolicy, in_channels: int, width: int, count: int) -> nn.Module:
    """Blocks in a row, the first with stride 2; the policy says what runs again."""
    row = [xception_block(in_channels, width, stride=2)]
    row += [xception_block(4 * width, width) for _ in range(count - 1)]
    return policy.stage(nn.Sequential(*map(policy.block, row)))
