"""The efficient spatial pyramid, ESP: reduce, dilate five ways, add up, concatenate.

A 1 x 1 convolution reduces to a fifth of the channels; five 3 x 3 convolutions with dilations 1, 2,
4, 8 and 16 read them. Those of dilation 2 and more are added up one after another, which the paper
calls hierarchical feature fusion: it takes away the grids that dilation leaves. All is concatenated,
and the input added if it has as many channels. Batch norm and PReLU follow.

Until batch norm this is linear. So it is one layer of a stack: it keeps its input and its raw map,
and computes the reduced map again where the backward pass needs it.

Source: Mehta et al., ESPNet: Efficient Spatial Pyramid of Dilated Convolutions for Semantic
Segmentation, arXiv:1803.06815, section 3 and figures 1 and 3. The first dilated convolution takes
the channels that a fifth leaves over, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from revseg.engine.gradients import Grads
from revseg.engine.tracing import has_hooks
from revseg.layers.blocks import BNAct
from revseg.layers.convolution import Convolution
from revseg.layers.layer_input import LayerInput
from revseg.layers.layer_module import LayerModule, Linear
from revseg.layers.linear import LinearOp

DILATIONS = (1, 2, 4, 8, 16)


class ESP(LayerModule):
    """[N, in, H, W] to [N, out, h, w]: ceil of half the size if it strides, else the same.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out, at least 5.
        stride: 2 to reduce by a 3 x 3 convolution with stride 2 instead.
        residual: Whether to add the input, which must then have the output's shape.

    Raises:
        ValueError: If five convolutions cannot share the channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, residual: bool = False
    ) -> None:
        super().__init__()
        if out_channels < len(DILATIONS):
            raise ValueError(f"expected at least {len(DILATIONS)} channels after ESP, got {out_channels}")
        n = out_channels // len(DILATIONS)
        kernel = 3 if stride == 2 else 1
        self.reduce = nn.Conv2d(in_channels, n, kernel, stride, kernel // 2, bias=False)
        self.dilated = nn.ModuleList(
            nn.Conv2d(n, out_channels - 4 * n if d == 1 else n, 3, padding=d, dilation=d, bias=False)
            for d in DILATIONS
        )
        self.norm = BNAct(out_channels)
        self.residual = residual

    def plain(self, x: Tensor) -> Tensor:
        reduced = self.reduce(x)
        y = _fused([conv(reduced) for conv in self.dilated])
        return self.norm(x + y if self.residual else y)  # type: ignore[no-any-return]

    def linear(self) -> Linear | None:
        reduce, dilated = Convolution.of(self.reduce), [Convolution.of(conv) for conv in self.dilated]
        if reduce is None or None in dilated or has_hooks(self.dilated):
            return None
        op = _ESPOp(reduce, [conv for conv in dilated if conv is not None], self.residual)
        weights = (self.reduce.weight, *(conv.weight for conv in self.dilated))
        return op, weights  # type: ignore[return-value]


class _ESPOp(LinearOp):
    """The raw map of `ESP`. Parameters: the weight that reduces, then those that dilate."""

    def __init__(self, reduce: Convolution, dilated: Sequence[Convolution], residual: bool) -> None:
        self.reduce, self.dilated, self.residual = reduce, dilated, residual

    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
        reduced = self.reduce.forward(x, parameters[0])
        y = _fused([c.forward(reduced, w) for c, w in zip(self.dilated, parameters[1:], strict=True)])
        return x + y if self.residual else y

    def make(self, x: LayerInput, parameters: Sequence[Tensor]) -> Tensor:
        return self.forward(x.values(), *parameters)

    def backward(
        self, du: Tensor, x: LayerInput, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        reduced = self.reduce.make(replace(x, computed=True), parameters[:1])
        widths = [len(weight) for weight in parameters[1:]]
        first, *others = torch.split(du, widths, 1)
        # A map that was added to all behind it gets the sum of their gradients.
        maps = [first, *reversed(list(accumulate(reversed(others))))]
        below = wanted[0] or wanted[1]
        dreduced: Tensor | None = None
        found: Grads = []
        for conv, d, weight, want in zip(self.dilated, maps, parameters[1:], wanted[2:], strict=True):
            part, dweight = conv.backward(d, LayerInput(reduced), [weight], [below, want])
            found.append(dweight)
            if part is not None:
                dreduced = part if dreduced is None else dreduced + part
        if dreduced is None:
            return [None, None, *found]
        dx, dweight = self.reduce.backward(dreduced, x, parameters[:1], wanted[:2])
        return [dx + du if self.residual and dx is not None else dx, dweight, *found]


def _fused(maps: Sequence[Tensor]) -> Tensor:
    """Hierarchical feature fusion: all maps but the first added up, concatenated."""
    return torch.cat((maps[0], *accumulate(maps[1:])), 1)
