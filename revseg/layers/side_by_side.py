"""Convolutions of one input whose maps stand side by side, as one linear op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revseg.engine.gradients import Grads
from revseg.layers.convolution import Convolution
from revseg.layers.layer_input import LayerInput, by_image, gather
from revseg.layers.linear import LinearOp


class SideBySide(LinearOp):
    """Several convolutions of one input, without biases, their maps joined by channels.

    Args:
        convolutions: Each with one parameter, its weight.
    """

    def __init__(self, convolutions: Sequence[Convolution]) -> None:
        self.convolutions = convolutions

    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
        maps = [conv.forward(x, weight) for conv, weight in zip(self.convolutions, parameters, strict=True)]
        return torch.cat(maps, 1)

    def make(self, x: LayerInput, parameters: Sequence[Tensor]) -> Tensor:
        if by_image(x.raw):  # the maps and the joint one exist together for one image alone
            return gather((self.forward(image, *parameters) for image in x.images()), len(x.raw))
        return self.forward(x.values(), *parameters)

    def backward(
        self, du: Tensor, x: LayerInput, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        x = x.hold() if any(wanted[1:]) else x
        parts = torch.split(du, [len(weight) for weight in parameters], dim=1)
        found: Grads = []
        dx: Tensor | None = None
        for conv, part, weight, asked in zip(self.convolutions, parts, parameters, wanted[1:], strict=True):
            more, dweight = conv.backward(part, x, [weight], [wanted[0], asked])
            found.append(dweight)
            dx = more if dx is None or more is None else dx.add_(more)
        return [dx, *found]
