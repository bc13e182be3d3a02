"""The functions in the couplings of the workload: channels to module."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def conv_pair(c: int) -> nn.Module:
    """The function of the main workload: two asymmetric convolutions, 3x1 and 1x3."""
    return nn.Sequential(
        nn.Conv2d(c, c, (3, 1), padding=(1, 0)), nn.BatchNorm2d(c), nn.PReLU(c),
        nn.Conv2d(c, c, (1, 3), padding=(0, 1)), nn.BatchNorm2d(c), nn.PReLU(c),
    )  # fmt: skip


def conv3x3(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True))


def separable(c: int) -> nn.Module:
    """A depthwise convolution, then one across channels."""
    return nn.Sequential(
        nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True),
        nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True),
    )  # fmt: skip


class ChannelAttention(nn.Module):
    """Attention over channels: each output channel is a weighted mean of all value channels."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, 1)  # [N, C, H * W] each
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)  # [N, C, C]
        y: Tensor = (weights @ v).view_as(x)
        return y


def mlp(c: int) -> nn.Module:
    """A multi-layer perceptron on each pixel."""
    return nn.Sequential(nn.GroupNorm(1, c), nn.Conv2d(c, 2 * c, 1), nn.GELU(), nn.Conv2d(2 * c, c, 1))


FUNCTIONS: dict[str, Callable[[int], nn.Module]] = {
    "conv pair": conv_pair,
    "conv 3x3": conv3x3,
    "separable": separable,
    "channel attention": ChannelAttention,
    "mlp": mlp,
}
