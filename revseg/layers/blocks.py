"""Blocks that the networks share.

The small networks of this library are made of one brick: convolution, batch norm, activation.
"Conv" in their papers' tables means all three. The convolution has a bias only if the paper's has:
the batch norm that follows subtracts it again. Padding is always "same": only the stride changes
the size of a map, to ceil(size / stride), so odd sizes need no special care anywhere.

Images reach a model as bytes and are normalised where they are used: four times less to move
and to keep than float32.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg.layers.bands.cut import Bands
from revseg.layers.bands.joined import normed_by_bands
from revseg.layers.convolution import Convolution
from revseg.layers.images import Normalization
from revseg.layers.layer_module import LayerModule
from revseg.layers.linear import prepared
from revseg.layers.stack import Stack
from revseg.layers.stack_layer import Layer, layer_of

ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "prelu": lambda channels: nn.PReLU(channels),
    "prelu_shared": lambda channels: nn.PReLU(1),
    "relu": lambda channels: nn.ReLU(),
    "none": lambda channels: nn.Identity(),
}


class BNAct(nn.Sequential):
    """Batch norm, then activation.

    Args:
        channels: C.
        activation: One of `ACTIVATIONS`: a PReLU with a slope per channel, with one shared
            slope, a ReLU, or none.
        eps: What batch norm adds to the variance.
        momentum: Weight of the newest batch in the running statistics.

    Raises:
        ValueError: If the activation is unknown.
    """

    def __init__(
        self, channels: int, *, activation: str = "prelu", eps: float = 1e-3, momentum: float = 0.1
    ) -> None:
        super().__init__(
            nn.BatchNorm2d(channels, eps=eps, momentum=momentum), _activation(activation, channels)
        )

    bands: Bands | None = None  # by which it runs where training asks for it
    save_activations = False  # True for whole maps nevertheless

    def forward(self, *maps: Tensor) -> Tensor:
        """Of maps of one size, joined by their channels in the dtype of the first."""
        by_bands = None if self.bands is None else normed_by_bands(self, maps)
        if by_bands is not None:
            return by_bands
        x = maps[0] if len(maps) == 1 else torch.cat([each.to(maps[0].dtype) for each in maps], dim=1)
        return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]


class PooledBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that also takes a single value per channel: one image, pooled to one cell.

    Such a batch has no deviation, and its mean would leave nothing of it. In training it is
    normalised by the running statistics, as in evaluation, and does not move them, so a network
    trains at batch 1 and its pooled branches learn. Larger batches are those of `nn.BatchNorm2d`.
    """

    def forward(self, x: Tensor) -> Tensor:  # [N, C, h, w] -> [N, C, h, w]
        if x.numel() != x.shape[1]:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class JoinedClassifier(nn.Module):
    """Maps of one size joined, normed, and read as classes by a 1 x 1 convolution without bias.

    Args:
        channels: Of all maps together.
        num_classes: C.
        dropout: Probability of dropping a channel before the convolution.
    """

    def __init__(self, channels: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.join = BNAct(channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1, bias=False)

    def forward(self, *maps: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.join(*maps)))  # type: ignore[no-any-return]


class ConvBNAct(LayerModule, nn.Sequential):
    """Convolution, batch norm, activation: [N, in, H, W] to [N, out, h, w].

    Names and numbers are those of `nn.Sequential(nn.Conv2d(...), nn.BatchNorm2d(...), nn.PReLU(...))`.
    Run as a layer of a stack (`revseg.layers.stack`), which keeps its input and its raw map for the
    backward pass, where the three modules keep four maps; a `Stack` of such layers keeps the raw
    maps alone.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        kernel: Size of the kernel, odd; one number or (height, width).
        stride: Step of the convolution; the map comes out at ceil(size / stride).
        dilation: Distance between the taps of the kernel.
        groups: Of channels, each convolved for itself.
        bias: Whether the convolution has a bias, which batch norm takes out again.
        activation: See `BNAct`.
        eps: See `BNAct`.
        momentum: See `BNAct`.

    Raises:
        ValueError: If a kernel size is even: the map could not keep its size.
    """

    any_memory_format = True  # for the engine, which may lay out streams as convolutions want them

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int] = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        activation: str = "prelu",
        eps: float = 1e-3,
        momentum: float = 0.1,
    ) -> None:
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        if height % 2 == 0 or width % 2 == 0:
            raise ValueError(f"expected odd kernel sizes, got {height} x {width}")
        padding = (dilation * (height // 2), dilation * (width // 2))
        super().__init__(
            nn.Conv2d(
                in_channels, out_channels, (height, width), stride, padding, dilation, groups, bias=bias
            ),
            nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum),
            _activation(activation, out_channels),
        )

    def as_layer(self) -> Layer | None:
        if len(self) != 3:
            return None
        conv: Any
        conv, bn, act = self
        op = Convolution.of(conv, self.prepare)
        return None if op is None else layer_of(op, (conv.weight, conv.bias), bn, act)

    prepare: Callable[[Tensor], Tensor] | None = None  # what makes images out of bytes

    def plain(self, x: Tensor) -> Tensor:
        return nn.Sequential.forward(self, x)  # type: ignore[no-any-return, no-untyped-call]


class ImageConvBNAct(ConvBNAct):
    """The first layer of a network: takes images, bytes or already normalised.

    Bytes are normalised one image at a time, so the batch never exists as floats.
    """

    prepare: Normalization

    def __init__(self, in_channels: int, out_channels: int, *arguments: Any, **options: Any) -> None:
        super().__init__(in_channels, out_channels, *arguments, **options)
        self.prepare = Normalization.of_channels(in_channels)

    def plain(self, x: Tensor) -> Tensor:
        conv: Any = self[0]
        return super().plain(prepared(x, self.prepare, conv.weight.dtype))


def asymmetric_pairs(
    channels: int,
    dilations: Sequence[int],
    kernel: int = 3,
    *,
    dropout: float = 0.0,
    activation: str = "prelu",
    eps: float = 1e-3,
    momentum: float = 0.1,
    wrap: Callable[[nn.Module], nn.Module] = lambda pair: pair,
) -> Stack:
    """Pairs of an n x 1 and a 1 x n convolution, each with batch norm and activation.

    A pair sees what an n x n convolution sees with 2 n instead of n² weights per pair of
    channels.

    Args:
        channels: C, the same everywhere.
        dilations: The dilation of each pair, in order.
        kernel: n, odd.
        dropout: Probability of dropping a whole channel after the last pair; 0 adds no layer.
        activation: See `BNAct`.
        eps: See `BNAct`.
        momentum: See `BNAct`.
        wrap: Called with each pair, for what stands in its place.

    Returns:
        A module [N, C, h, w] -> [N, C, h, w].
    """
    layer = partial(ConvBNAct, channels, channels, activation=activation, eps=eps, momentum=momentum)
    pairs = (
        Stack(layer((kernel, 1), dilation=dilation), layer((1, kernel), dilation=dilation))
        for dilation in dilations
    )
    last = [nn.Dropout2d(dropout)] if dropout > 0 else []
    return Stack(*map(wrap, pairs), *last)


def _activation(name: str, channels: int) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name](channels)
