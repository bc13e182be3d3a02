"""Convolutions of one input whose maps stand side by side, as one maker."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revseg.layers.linear import Convolution, Grads, Source, by_image, gather, held, images_of


class SideBySide:
    """The maker of several convolutions of one input, without biases, their maps joined by channels.

    Args:
        makers: One for each convolution.
    """

    def __init__(self, makers: Sequence[Convolution]) -> None:
        self.makers = makers

    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.cat([m.forward(x, weight) for m, weight in zip(self.makers, parameters, strict=True)], 1)

    def make(self, x: Source, like: Tensor, parameters: Sequence[Tensor], computed: bool) -> Tensor:
        if by_image(like):  # the maps and the joint one exist together for one image alone
            return gather((self.forward(image, *parameters) for image in images_of(x, len(like))), len(like))
        return self.forward(x(lambda whole: whole), *parameters)

    def backward(
        self, du: Tensor, x: Source, like: Tensor, parameters: Sequence[Tensor], wanted: list[bool]
    ) -> Grads:
        whole = x(lambda whole: whole) if any(wanted[1:]) else like
        parts = torch.split(du, [len(weight) for weight in parameters], dim=1)
        found: Grads = []
        dx: Tensor | None = None
        for maker, part, weight, asked in zip(self.makers, parts, parameters, wanted[1:], strict=True):
            more, dweight = maker.backward(part, held(whole), like, [weight], [wanted[0], asked])
            found.append(dweight)
            dx = more if dx is None or more is None else dx.add_(more)
        return [dx, *found]
