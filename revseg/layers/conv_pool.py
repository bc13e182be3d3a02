"""Down-sampling by a convolution beside a pool: what the pool keeps costs no weights.

A 3 x 3 convolution with stride 2 makes the new channels, a 2 x 2 max pool carries the old ones
over. Both are concatenated, batch norm and an activation follow.

Source: Paszke et al., ENet: A Deep Neural Network Architecture for Real-Time Semantic
Segmentation, arXiv:1606.02147, figure 2 (a), its initial block; ERFNet has it three times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg.engine.gradients import Grads
from revseg.layers.blocks import BNAct
from revseg.layers.convolution import Convolution
from revseg.layers.images import Normalization
from revseg.layers.layer_input import LayerInput, gather
from revseg.layers.layer_module import LayerModule, Linear
from revseg.layers.linear import LinearOp, prepared, summed

Prepare = Callable[[Tensor], Tensor]


class ConvPool(LayerModule):
    """Half the size, more channels: [N, in, H, W] to [N, out, ceil(H / 2), ceil(W / 2)].

    Run as a layer of a stack (`revseg.layers.stack`). The convolution has a bias, as in both papers'
    code, although batch norm subtracts it again.

    Args:
        in_channels: Channels that come in, and that the pool keeps.
        out_channels: Channels that go out, more than come in.
        activation: See `revseg.layers.blocks.BNAct`.
        eps: See `revseg.layers.blocks.BNAct`.

    Raises:
        ValueError: If no channels are left for the convolution, or the activation is unknown.
    """

    prepare: Prepare | None = None  # what makes images out of bytes

    def __init__(
        self, in_channels: int, out_channels: int, *, activation: str = "relu", eps: float = 1e-3
    ) -> None:
        super().__init__()
        if out_channels <= in_channels:
            raise ValueError(f"expected more than {in_channels} channels after ConvPool, got {out_channels}")
        self.conv = nn.Conv2d(in_channels, out_channels - in_channels, 3, stride=2, padding=1)
        self.norm = BNAct(out_channels, activation=activation, eps=eps)

    def plain(self, x: Tensor) -> Tensor:
        x = prepared(x, self.prepare, self.conv.weight.dtype)
        return self.norm(torch.cat((self.conv(x), _pool(x)), 1))  # type: ignore[no-any-return]

    def linear(self) -> Linear | None:
        conv = Convolution.of(self.conv)
        if conv is None:
            return None
        return _ConvPoolOp(conv, self.prepare), (self.conv.weight, self.conv.bias)


class ImageConvPool(ConvPool):
    """The first layer of a network: takes images, bytes or already normalised.

    Bytes are normalised one image at a time, so the batch never exists as floats.
    """

    prepare: Normalization

    def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
        super().__init__(in_channels, out_channels, **options)
        self.prepare = Normalization.of_channels(in_channels)


class _ConvPoolOp(LinearOp):
    """The raw map of `ConvPool`, an image at a time."""

    def __init__(self, conv: Convolution, prepare: Prepare | None) -> None:
        self.conv, self.prepare = conv, prepare

    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
        x = prepared(x, self.prepare, parameters[0].dtype)
        return torch.cat((self.conv.forward(x, *parameters), _pool(x)), 1)

    def make(self, x: LayerInput, parameters: Sequence[Tensor]) -> Tensor:
        return gather((self.forward(image, *parameters) for image in x.images()), len(x.raw))

    def backward(
        self, du: Tensor, x: LayerInput, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        dx = torch.empty_like(x.raw, dtype=du.dtype) if wanted[0] else None
        total: Grads = [None] * len(parameters)
        old = x.raw.shape[1]
        for i, image in enumerate(x.images()):
            image = prepared(image, self.prepare, du.dtype)
            d = du[i : i + 1]
            part, *more = self.conv.backward(d[:, :-old], LayerInput(image), parameters, wanted)
            total = summed(total, more)
            if dx is not None and part is not None:
                dx[i : i + 1] = part.add_(_pool_backward(d[:, -old:], image))
        return [dx, *total]


def _pool(x: Tensor) -> Tensor:
    """The largest of each 2 x 2 square, of what there is of it at an odd border."""
    return F.max_pool2d(x, 2, ceil_mode=True)


def _pool_backward(dy: Tensor, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        pooled = _pool(x)
    return torch.autograd.grad(pooled, x, dy)[0]
