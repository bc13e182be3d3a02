"""The linear part of a layer: a convolution, or what stands in its place.

`forward` is ordinary differentiable PyTorch, and the definition of the rest. `make` gives the same raw map without
a graph, `backward` the gradients; both ask for the input only if they need its values, and for no more of
it than they need: it may have to be computed first (`revseg.layers.layer_input`).

An op that also does a part of what stands before or behind it, norm and activation, has its own
`make_with_statistics` and `layer_gradients`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from revseg import ops
from revseg.engine.gradients import Grads
from revseg.layers.layer_input import LayerInput
from revseg.layers.norms import batch_statistics, bn_act_backward


class LinearOp(ABC):
    """How a layer makes its raw map [N, C, h, w] from its input, and the gradients of that."""

    activates_its_input = (
        False  # whether it reads the raw map before it, and would only lose by an activated one
    )

    dims = 2  # of a map, besides images and channels

    @abstractmethod
    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """The raw map; differentiable."""

    @abstractmethod
    def make(self, x: LayerInput, parameters: Sequence[Tensor]) -> Tensor:
        """The raw map, without a graph; `parameters` as given to `forward`."""

    @abstractmethod
    def backward(
        self, du: Tensor, x: LayerInput, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Grads:
        """Gradients of the input and the parameters, None for those not wanted.

        Args:
            du: The gradient of the raw map; may be written to.
            x: As given to `make`.
            parameters: As given to `make`.
            wanted: Whether the gradient of the input and of each parameter is.
        """

    def make_with_statistics(
        self, x: LayerInput, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The raw map, and its mean and biased variance by channel [C], float64 where the device has it."""
        u = self.make(x, parameters)
        return u, batch_statistics(u)

    def layer_gradients(
        self, end: LayerEnd, x: LayerInput, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> LayerGradients:
        """The gradients of a whole layer; `end` is used up, the rest is as in `backward`."""
        du, of_norm = end.of_raw_map()
        dx, *of_op = self.backward(du, x, parameters, wanted)
        return LayerGradients(dx, of_op, of_norm, None)


class LayerGradients(NamedTuple):
    """The gradients of a layer.

    Attributes:
        dx: Of its input, None if it is not wanted.
        of_op: Of the parameters of its linear op, None for those not wanted.
        of_norm: Of weight and bias of its norm and of the slope of its activation, each [C], float64 where
            the device has it.
        sums: `bn_act_sums` of the raw map before with dx, if they were taken on the way.
    """

    dx: Tensor | None
    of_op: Grads
    of_norm: list[Tensor]
    sums: Tensor | None


class LayerEnd:
    """Where a gradient enters a layer.

    Args:
        u: The raw map of the layer [N, C, h, w].
        dz: The gradient of what norm and activation made of it.
        norm: What follows the raw map.
        batch: Whether the statistics of the norm are those of the batch.
        out: Memory for the gradient of the raw map: dz, u, or None for a new one.
        sums: `bn_act_sums(u, dz, norm)`, if the layer behind took them.
    """

    def __init__(
        self, u: Tensor, dz: Tensor, norm: ops.Norm, batch: bool, out: Tensor | None, sums: Tensor | None
    ) -> None:
        self.u, self.dz, self.norm, self.batch, self.out, self.sums = u, dz, norm, batch, out, sums

    def of_raw_map(self) -> tuple[Tensor, list[Tensor]]:
        """The gradient of the raw map, and those of the norm; maps that are not needed any more are let go."""
        du, *of_norm = bn_act_backward(self.u, self.dz, self.norm, self.batch, self.out)
        del self.u, self.dz, self.out
        return du, of_norm


def summed(total: Grads, more: Sequence[Tensor | None]) -> Grads:
    """The sums of gradients, in place; None for those that are none."""
    return [m if t is None or m is None else t.add_(m) for t, m in zip(total, more, strict=True)]


def prepared(x: Tensor, prepare: Callable[[Tensor], Tensor] | None, dtype: torch.dtype) -> Tensor:
    """What `prepare` makes of images, of this dtype unless it left them as they were; x itself without it."""
    images = x if prepare is None else prepare(x)
    return images if images is x else images.to(dtype)
